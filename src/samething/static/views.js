"use strict";
// Which view is shown, the map, and the index's own page.

function showView(name) {
  if (byId(`view-${name}`).hidden) scrollTo({ top: 0 });
  for (const view of ["search", "map", "index"]) byId(`view-${view}`).hidden = view !== name;
  for (const link of document.querySelectorAll("nav [data-view]")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

function follow() {
  const [name, value] = location.hash.slice(1).split("=");
  if (name === "map") {
    showView("map");
    showMap();
  } else if (name === "index") {
    showView("index");
    showIndex();
  } else {
    showView("search");
    if (name === "similar" && value) searchSimilar(decodeURIComponent(value));
    else if (name === "label" && value) searchLabel(decodeURIComponent(value));
    else if (name === "upload" && state.uploaded) searchFiles(state.uploaded);
    else clearQuery();
  }
}
addEventListener("hashchange", follow);

// ---- the map

let mapAsked = 0;
function loadScript(source) {
  return new Promise((resolve, reject) => {
    const script = element("script");
    script.onload = resolve;
    script.onerror = () => reject(new Error("The map needs Bokeh on the server: pip install 'samething[map]'"));
    script.src = source;
    document.head.append(script);
  });
}

async function showMap() {
  const mine = (mapAsked += 1);
  const say = (text, isWaiting = false) => {
    byId("map-message").textContent = text;
    byId("map-plot").hidden = Boolean(text);
    byId("map-progress").hidden = !isWaiting;
  };
  try {
    if (!byId("map-plot").childElementCount) say("Loading …", true);
    for (const name of ["bokeh", "bokeh-gl"]) if (!window.Bokeh || name !== "bokeh") await loadScriptOnce(`static-bokeh/${name}.min.js`);
    let found = await ask(`map?dark=${isDark()}`);
    while (!found.figure) {
      say("The map is being made; a large collection takes minutes the first time …", true);
      await new Promise((resolve) => setTimeout(resolve, 700));
      if (mine !== mapAsked || byId("view-map").hidden) return;
      found = await ask(`map?dark=${isDark()}`);
    }
    if (mine !== mapAsked) return;
    say("");
    byId("map-plot").replaceChildren();
    await window.Bokeh.embed.embed_item(found.figure, "map-plot");
  } catch (error) {
    say([error.message, error.nextStep].filter(Boolean).join(": "));
  }
}

const loaded = new Map();
function loadScriptOnce(source) {
  if (!loaded.has(source)) loaded.set(source, loadScript(source).catch((error) => { loaded.delete(source); throw error; }));
  return loaded.get(source);
}
document.addEventListener("theme", () => { if (!byId("view-map").hidden) showMap(); });

// ---- the index

let watching = null;
async function showIndex() {
  clearTimeout(watching);
  if (byId("view-index").hidden) return;
  try {
    const [info, status] = [await ask("info"), await ask("status")];
    showInfo(info);
    fillFacts(byId("facts"), [
      ["Pictures", status.num_images.toLocaleString("en")],
      ["Labels", info.num_labels.toLocaleString("en")],
      ["Model", `${info.model}, ${info.dim} numbers a picture`],
      ["Place", status.location],
    ]);
    const most = Math.max(1, ...Object.values(info.domains));
    byId("bars").replaceChildren(...Object.entries(info.domains).map(([name, count]) => {
      const row = element("div");
      const bar = element("i");
      bar.style.width = `${(count / most) * 100}%`;
      row.append(element("span", "", name || "no domain"), bar, element("span", "quiet", count.toLocaleString("en")));
      return row;
    }));
    showSync(status.sync);
    byId("sync").disabled = status.sync.state === "running";
    byId("sync").hidden = !info.can_change;
    byId("add").hidden = !info.can_change;
    byId("read-only").hidden = info.can_change;
    watching = setTimeout(showIndex, status.sync.state === "running" ? 500 : 5000);
  } catch (error) {
    fillFacts(byId("facts"), [["Problem", error.message]]);
  }
}

function showSync(sync) {
  const running = sync.state === "running";
  const counts = sync.total ? `${sync.done.toLocaleString("en")} of ${sync.total.toLocaleString("en")} new pictures embedded` : "looking for changes …";
  const texts = { "never run": "Not run since the server started.", running: counts, done: `Done: ${sync.message}.`, failed: `Failed: ${sync.message}` };
  byId("sync-state").textContent = texts[sync.state];
  byId("sync-progress").hidden = !running;
  if (running && sync.total) byId("sync-progress").value = sync.done / sync.total;
  else byId("sync-progress").removeAttribute("value");
}

byId("sync").addEventListener("click", async () => {
  byId("sync").disabled = true;
  try {
    showSync(await ask("sync", { method: "POST" }));
    watching = setTimeout(showIndex, 300);
  } catch (error) {
    byId("sync-state").textContent = error.message;
    byId("sync").disabled = false;
  }
});

byId("add").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = new FormData();
  form.append("image", byId("add-file").files[0], "image");
  form.append("label", byId("add-label").value.trim());
  form.append("domain", byId("add-domain").value.trim());
  byId("add-state").textContent = "Adding …";
  try {
    const added = await ask("add", { method: "POST", body: form });
    byId("add-state").textContent = "Added. ";
    const link = element("a", "", "What is like it?");
    link.href = `#similar=${encodeURIComponent(added.id)}`;
    byId("add-state").append(link);
    showIndex();
  } catch (error) {
    byId("add-state").textContent = error.message;
  }
});

ask("info").then(showInfo).catch((error) => complain(error));
follow();
