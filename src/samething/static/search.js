"use strict";
// The search view: what is looked for, its crop, the filters, the results.

const state = { files: null, uploaded: null, similar: null, label: null, crop: null, matches: [], info: null, asking: null, url: null };

// ---- what is looked for

const linkTo = (kind, value) => `#${kind}=${encodeURIComponent(value)}`;
const thumbnail = (id) => `thumbnails/${encodeURIComponent(id)}`;

function showQuery(source, name) {
  if (state.url) URL.revokeObjectURL(state.url);
  state.url = source instanceof Blob ? URL.createObjectURL(source) : null;
  byId("stage").hidden = !source;
  byId("looked-for").hidden = Boolean(source);
  byId("looked-for").replaceChildren();
  if (source) byId("query").src = state.url || source;
  byId("query-name").textContent = name;
  document.body.classList.add("compact");
  byId("work").hidden = false;
  setCrop(null);
}

function searchFiles(files) {
  const pictures = [...files].filter((file) => !file.type || file.type.startsWith("image/"));
  if (!pictures.length) {
    complain(new Error("This is not a picture"));
    return;
  }
  const limits = state.info && state.info.limits;
  const size = pictures.reduce((sum, file) => sum + file.size, 0);
  if (limits && size > limits.max_bytes - 10000) {
    complain(new Error(`The picture is too large: at most ${Math.floor(limits.max_bytes / 2 ** 20)} MB are taken`));
    return;
  }
  state.files = state.uploaded = pictures;
  state.similar = state.label = null;
  const name = pictures[0].name || "pasted picture";
  showQuery(pictures[0], pictures.length > 1 ? `${name} and ${pictures.length - 1} more of the same thing` : name);
  if (location.hash !== "#upload") history.pushState(null, "", "#upload");
  showView("search");
  search();
}

function searchSimilar(id) {
  state.files = state.label = null;
  state.similar = id;
  const known = state.matches.find((match) => match.id === id);
  showQuery(`images/${encodeURIComponent(id)}`, known ? known.label || known.path : "a picture of the index");
  scrollTo({ top: 0 });
  search();
}

function searchLabel(label) {
  state.files = state.similar = null;
  state.label = label;
  showQuery(null, label);
  scrollTo({ top: 0 });
  search();
}

// the pictures that a label stands for; each leads to what is like it alone
function showLookedFor(ids) {
  byId("looked-for").replaceChildren(...ids.map((id) => pictureLink(id)));
}

function pictureLink(id) {
  const link = element("a");
  link.href = linkTo("similar", id);
  const picture = element("img");
  picture.src = thumbnail(id);
  picture.alt = "Find what is like this picture";
  link.append(picture);
  return link;
}

function clearQuery() {
  state.files = state.similar = state.label = null;
  state.matches = [];
  if (state.asking) state.asking.abort();
  document.body.classList.remove("compact");
  byId("work").hidden = true;
  byId("file").value = byId("camera").value = "";
  quiet();
}

// ---- asking

function filters() {
  const chosen = [...document.querySelectorAll("#domains [aria-pressed=true]")].map((chip) => ["domain", chip.value]);
  for (const name of ["label", "folder", "where"]) {
    const text = byId(name).value.trim();
    if (text) chosen.push([name, text]);
  }
  byId("filters-count").textContent = chosen.length ? `${chosen.length} set` : "";
  if (byId("rerank").value) chosen.push(["rerank", byId("rerank").value]);
  return [...chosen, ["k", byId("k").value]];
}

async function search() {
  if (!state.files && !state.similar && !state.label) return;
  if (state.asking) state.asking.abort();
  const asking = (state.asking = new AbortController());
  document.body.classList.add("working");
  byId("count").textContent = "Looking …";
  try {
    let found;
    if (state.label) {
      found = await ask(`similar?${new URLSearchParams([["to_label", state.label], ...filters()])}`, { signal: asking.signal });
      showLookedFor(found.looked_for);
    } else if (state.similar && !state.crop) {
      const path = `similar/${encodeURIComponent(state.similar)}?${new URLSearchParams(filters())}`;
      found = await ask(path, { signal: asking.signal });
    } else {
      const form = new FormData();
      const pictures = state.files || [await wholePicture(state.similar, asking.signal)];
      for (const picture of state.crop ? pictures.slice(0, 1) : pictures) form.append("image", picture, "image");
      for (const [name, value] of filters()) form.append(name, value);
      if (state.crop) form.append("crop", state.crop.join(","));
      found = await ask("search", { method: "POST", body: form, signal: asking.signal });
    }
    quiet();
    state.matches = found.matches;
    showResults(found.advice);
  } catch (error) {
    if (error.name === "AbortError") return;
    state.matches = [];
    showResults();
    byId("count").textContent = "";
    complain(error);
  } finally {
    if (state.asking === asking) document.body.classList.remove("working");
  }
}

async function wholePicture(id, signal) {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch(`images/${encodeURIComponent(id)}`, { headers, signal });
  if (!answer.ok) throw new ServerError(answer.status, { error: "The picture's file is not there any more" });
  return answer.blob();
}

// ---- results

// all that was found, in one grid; where the model was calibrated a heading stands before each band
function showResults(advice = "") {
  const shown = [];
  state.matches.forEach((match, place) => {
    const before = place ? state.matches[place - 1].band : null;
    if (match.band && match.band !== before) shown.push(element("h3", "band", BANDS[match.band]));
    shown.push(tile(match));
  });
  byId("results").replaceChildren(...shown);
  const count = state.matches.length;
  byId("count").textContent = count ? `${count} ${count === 1 ? "picture" : "pictures"}` : "Nothing found";
  byId("advice").textContent = advice;
  byId("advice").hidden = !advice;
}

const BANDS = { "the same": "The same", perhaps: "Perhaps the same", "no match": "No match: only the nearest" };

function tile(match) {
  const made = element("div", "tile");
  const go = element("button", "go");
  go.type = "button";
  go.dataset.id = match.id;
  go.title = match.path;
  const picture = element("img");
  picture.src = thumbnail(match.id);
  picture.alt = match.label || match.path;
  picture.loading = "lazy";
  go.append(picture);
  const place = placeOf(match);
  if (place && match.metadata.width) go.append(framed(place, match.metadata.width, match.metadata.height));
  const text = element("div", "text");
  const name = element(match.label ? "a" : "span", "name", match.label || match.path.split("/").pop());
  if (match.label) {
    name.href = linkTo("label", match.label);
    name.title = "Look for this label";
    name.tabIndex = -1; // one stop a tile for the keyboard; the closer view has the label too
  }
  text.append(name);
  const line = element("span", "line");
  line.append(element("span", "tag", match.domain || "no domain"));
  const score = element("span", "score", match.probability === null ? match.score.toFixed(3) : `${Math.round(match.probability * 100)} %`);
  score.title = match.probability === null ? "similarity" : `probability of the same thing; similarity ${match.score.toFixed(3)}`;
  line.append(score);
  text.append(line);
  if (agreement(match)) text.append(element("span", match.evidence.verified ? "verified" : "quiet", agreement(match)));
  go.addEventListener("click", () => { location.hash = linkTo("similar", match.id); });
  const more = element("button", "icon more", "⤢");
  more.type = "button";
  more.tabIndex = -1;
  more.setAttribute("aria-label", "Look closer");
  more.addEventListener("click", () => lookCloser(match));
  made.append(go, text, more);
  return made;
}

// ---- the crop, in pixels of the picture itself

function setCrop(box) {
  state.crop = box;
  byId("crop").hidden = !box;
  byId("uncrop").hidden = !box;
  byId("crop-hint").hidden = Boolean(box) || byId("stage").hidden;
  byId("propose").hidden = byId("stage").hidden;
}

function drawCrop(a, b) {
  const style = byId("crop").style;
  style.left = `${Math.min(a.x, b.x) * 100}%`;
  style.top = `${Math.min(a.y, b.y) * 100}%`;
  style.width = `${Math.abs(a.x - b.x) * 100}%`;
  style.height = `${Math.abs(a.y - b.y) * 100}%`;
  byId("crop").hidden = false;
}

const stage = byId("stage");
let dragged = null;
function placeIn(event) {
  const box = byId("query").getBoundingClientRect();
  const within = (value) => Math.min(1, Math.max(0, value));
  return { x: within((event.clientX - box.left) / box.width), y: within((event.clientY - box.top) / box.height) };
}
stage.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  stage.setPointerCapture(event.pointerId);
  dragged = { from: placeIn(event) };
});
stage.addEventListener("pointermove", (event) => {
  if (!dragged) return;
  dragged.to = placeIn(event);
  drawCrop(dragged.from, dragged.to);
});
stage.addEventListener("pointerup", () => {
  const picture = byId("query");
  const drawn = dragged;
  dragged = null;
  if (!drawn || !drawn.to) return;
  const [width, height] = [picture.naturalWidth, picture.naturalHeight];
  const box = [
    Math.floor(Math.min(drawn.from.x, drawn.to.x) * width),
    Math.floor(Math.min(drawn.from.y, drawn.to.y) * height),
    Math.ceil(Math.max(drawn.from.x, drawn.to.x) * width),
    Math.ceil(Math.max(drawn.from.y, drawn.to.y) * height),
  ];
  if (Math.abs(drawn.from.x - drawn.to.x) < 0.03 || Math.abs(drawn.from.y - drawn.to.y) < 0.03) {
    byId("crop").hidden = !state.crop; // a click is no box
    return;
  }
  setCrop(box);
  search();
});
stage.addEventListener("pointercancel", () => { dragged = null; byId("crop").hidden = !state.crop; });
byId("uncrop").addEventListener("click", () => { setCrop(null); search(); });

// the parts that stand out, one after the other
byId("propose").addEventListener("click", async () => {
  try {
    const form = new FormData();
    form.append("image", state.files ? state.files[0] : await wholePicture(state.similar), "image");
    const { boxes } = await ask("standing-out", { method: "POST", body: form });
    const before = boxes.findIndex((box) => String(box) === String(state.crop));
    if (!boxes.length) return;
    const [left, top, right, bottom] = boxes[(before + 1) % boxes.length];
    const { naturalWidth: width, naturalHeight: height } = byId("query");
    drawCrop({ x: left / width, y: top / height }, { x: right / width, y: bottom / height });
    setCrop([left, top, right, bottom]);
    search();
  } catch (error) {
    complain(error);
  }
});

if (matchMedia("(max-width: 860px)").matches) byId("filters").open = false; // results first on a small screen

// ---- where pictures come from

for (const id of ["file", "camera"]) byId(id).addEventListener("change", (event) => {
  if (event.target.files.length) searchFiles(event.target.files);
});
addEventListener("paste", (event) => {
  const files = event.clipboardData ? event.clipboardData.files : [];
  if (files.length) { event.preventDefault(); searchFiles(files); }
});
let depth = 0;
const hasFiles = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
addEventListener("dragenter", (event) => { if (hasFiles(event)) { depth += 1; document.body.classList.add("over-page"); } });
addEventListener("dragleave", () => { depth = Math.max(0, depth - 1); if (!depth) document.body.classList.remove("over-page"); });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  document.body.classList.remove("over-page");
  if (event.dataTransfer.files.length) searchFiles(event.dataTransfer.files);
});
byId("clear").addEventListener("click", () => { location.hash = ""; clearQuery(); });

byId("by-label").addEventListener("submit", (event) => {
  event.preventDefault();
  location.hash = linkTo("label", byId("look-label").value.trim());
});
byId("closer-all").addEventListener("click", () => byId("closer").close());

// ---- filters

let typing = null;
for (const id of ["label", "folder", "where"]) byId(id).addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(search, 500);
});
byId("k").addEventListener("change", search);
byId("rerank").addEventListener("change", search);
const LOOKS = { geometry: "the same places", regions: "parts of the pictures", "query-expansion": "what is like the best", "k-reciprocal": "who sees each other" };

function showInfo(info) {
  state.info = info;
  const names = Object.entries(info.domains);
  byId("about").textContent = `${info.num_images.toLocaleString("en")} pictures${names.length > 1 ? ` of ${names.length} domains` : ""}`;
  const pressed = new Set([...document.querySelectorAll("#domains [aria-pressed=true]")].map((chip) => chip.value));
  byId("domains").replaceChildren(...names.map(([name, count]) => {
    const chip = element("button", "chip", name || "no domain");
    chip.type = "button";
    chip.value = name;
    chip.setAttribute("aria-pressed", String(pressed.has(name)));
    chip.append(element("span", "", count.toLocaleString("en")));
    chip.addEventListener("click", () => {
      chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
      search();
    });
    return chip;
  }));
  const look = byId("rerank").value;
  byId("rerank-field").hidden = !info.rerankers.length;
  byId("rerank").replaceChildren(...["", ...info.rerankers].map((name) => {
    const option = element("option", "", name ? LOOKS[name] || name : "none");
    option.value = name;
    option.selected = name === look;
    return option;
  }));
  byId("start").hidden = !info.samples.length;
  byId("samples").replaceChildren(...info.samples.map(pictureLink));
  byId("by-label").hidden = !info.num_labels;
  byId("labels").replaceChildren(...info.labels.map((name) => {
    const option = element("option");
    option.value = name;
    return option;
  }));
  const columns = Object.keys(info.columns).filter((name) => !["id", "files", "folders", "labels", "domains", "paths"].includes(name));
  byId("columns").textContent = `Columns: ${columns.join(", ")}`;
}

// ---- keys

// the place of the tile above (-1) or below (1) another one; rows are as long as their section lets them be
function tileInRow(tiles, place, way) {
  const places = tiles.map((one) => one.parentElement).map(({ offsetLeft, offsetTop }) => [offsetLeft, offsetTop]);
  const [left, top] = places[Math.max(place, 0)];
  const tops = places.map(([, other]) => other).filter((other) => way * other > way * top);
  if (!tops.length) return place;
  const row = way > 0 ? Math.min(...tops) : Math.max(...tops);
  const away = places.map(([other, at]) => (at === row ? Math.abs(other - left) : Infinity));
  return away.indexOf(Math.min(...away));
}

addEventListener("keydown", (event) => {
  const isText = event.target.matches("input:not([type=range]):not([type=file]), select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey || isText || document.querySelector("dialog[open]")) return;
  if (event.key === "/") {
    event.preventDefault();
    byId("file").click();
    return;
  }
  const tiles = [...document.querySelectorAll("#results .go")];
  const place = tiles.indexOf(document.activeElement);
  if (!tiles.length || (place < 0 && document.activeElement !== document.body && !event.target.matches("#stage"))) return;
  const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: tileInRow(tiles, place, 1) - place, ArrowUp: tileInRow(tiles, place, -1) - place, Home: -place, End: tiles.length - 1 - place };
  if (event.key in moves) {
    event.preventDefault();
    const next = place < 0 ? 0 : Math.min(tiles.length - 1, Math.max(0, place + moves[event.key]));
    tiles[next].focus();
  } else if (event.key === " " && place >= 0) {
    event.preventDefault();
    lookCloser(state.matches.find((match) => match.id === tiles[place].dataset.id));
  }
});
byId("closer").querySelector(".close").addEventListener("click", () => byId("closer").close());
byId("closer").addEventListener("click", (event) => { if (event.target === byId("closer")) byId("closer").close(); });
