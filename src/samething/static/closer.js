"use strict";
// One match looked at closely: where the thing is in it, what agrees, and all that is known of it.

// what a second look found, in words; empty where that is nothing
function agreement(match) {
  const found = match.evidence;
  if (!found || !found.agreeing) return "";
  return `${found.verified ? "✓ verified: " : ""}${found.agreeing} points agree`;
}

// the match, a frame where the thing is in it; beside the picture looked for, with lines between places that agree
async function drawWhy(match) {
  const why = byId("closer-why");
  const found = match.evidence;
  const shown = byId("stage").hidden ? byId("looked-for").querySelectorAll("img")[found && found.image] : found && !found.image && byId("query");
  const is_there = Boolean(found && found.points.length && shown);
  const place = placeOf(match);
  why.replaceChildren();
  why.toggleAttribute("hidden", !is_there && !place);
  byId("closer-picture").hidden = is_there || Boolean(place);
  if (!is_there && !place) return;
  const other = new Image();
  other.src = `images/${encodeURIComponent(match.id)}?side=1200`;
  why.dataset.id = match.id;
  await Promise.all([other.decode(), is_there && shown.decode()]);
  if (why.dataset.id !== match.id) return; // another one was looked at meanwhile
  const drawn = [];
  let [start, height] = [0, other.naturalHeight];
  if (is_there) {
    height = shown.naturalHeight; // both equally high, with a gap
    start = shown.naturalWidth * 1.03;
    drawn.push(svg("image", { href: shown.src, x: 0, y: 0, width: shown.naturalWidth, height }));
  }
  const width = (other.naturalWidth * height) / other.naturalHeight;
  drawn.push(svg("image", { href: other.src, x: start, y: 0, width, height }));
  if (place) drawn.push(frame(place, start, width, height));
  const [left, top, right, bottom] = state.crop || [0, 0, shown && shown.naturalWidth, height];
  for (const [x, y, u, v] of is_there ? found.points : []) {
    const [x1, y1, x2, y2] = [left + x * (right - left), top + y * (bottom - top), start + u * width, v * height];
    drawn.push(svg("line", { x1, y1, x2, y2 }));
    for (const [cx, cy] of [[x1, y1], [x2, y2]]) drawn.push(svg("circle", { cx, cy, r: height / 140 }));
  }
  why.setAttribute("viewBox", `0 0 ${start + width} ${height}`);
  why.replaceChildren(...drawn);
}

function svg(name, values) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(values)) made.setAttribute(key, value);
  return made;
}

// where in the picture the thing is, as shares of its sides: by the index's regions, or by a second look
function placeOf(match) {
  const found = match.evidence;
  return match.place || (found && found.added > 0 && found.place) || null;
}

function frame([left, top, right, bottom], start, width, height) {
  return svg("rect", { x: start + left * width, y: top * height, width: (right - left) * width, height: (bottom - top) * height });
}

// a frame to lay over a picture that is shown as large as fits
function framed(place, width, height) {
  const made = svg("svg", { class: "place", viewBox: `0 0 ${width} ${height}` });
  made.append(frame(place, 0, width, height));
  return made;
}

function lookCloser(match) {
  drawWhy(match);
  const { taken, latitude, longitude } = match.metadata;
  const facts = [
    ["Score", match.score.toFixed(4)],
    ["Found at", match.place && match.place.map((share) => `${Math.round(100 * share)} %`).join(", ")],
    ["Second look", agreement(match)],
    ["Same thing", match.probability === null ? null : `${(match.probability * 100).toFixed(1)} %`],
    ["Domain", match.domain],
    ["Size", match.metadata.width ? `${match.metadata.width} × ${match.metadata.height}` : null],
    ["Taken", typeof taken === "number" ? new Date(taken * 1000).toISOString().slice(0, 16).replace("T", " ") : taken],
    ["Place", latitude === undefined ? null : `${latitude}, ${longitude}`],
    ["Path", match.path],
    ["Copies", match.copies.length ? match.copies.join("\n") : null],
  ];
  const known = new Set(["width", "height", "sha256", "size_bytes", "modified", "taken", "latitude", "longitude"]);
  for (const [name, value] of Object.entries(match.metadata)) if (!known.has(name)) facts.push([name, String(value)]);
  fillFacts(byId("closer-facts"), facts);
  byId("closer-label").textContent = match.label || match.path.split("/").pop();
  byId("closer-picture").src = `images/${encodeURIComponent(match.id)}?side=1200`;
  byId("closer-picture").alt = match.label || match.path;
  byId("closer-original").href = `images/${encodeURIComponent(match.id)}`;
  byId("closer-similar").onclick = () => {
    byId("closer").close();
    location.hash = linkTo("similar", match.id);
  };
  byId("closer-all").hidden = !match.label;
  byId("closer-all").href = linkTo("label", match.label);
  byId("closer-delete").hidden = !(state.info && state.info.can_change);
  byId("closer-delete").onclick = async () => {
    if (!confirm("Delete this picture from the index?")) return;
    byId("closer").close();
    try {
      await ask("delete", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ ids: [match.id] }),
      });
      search();
    } catch (error) {
      complain(error);
    }
  };
  byId("closer").showModal();
}

function fillFacts(list, facts) {
  const rows = facts.filter(([, value]) => value !== null && value !== undefined && value !== "");
  list.replaceChildren(...rows.flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]));
}
