"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const section = document.getElementById("explorer");
  const find = (selector) => section.querySelector(selector);
  const views = [...section.querySelectorAll(".view")].map((element) => ({ element, run: Number(element.dataset.run) }));
  const picks = [...section.querySelectorAll(".pick")];
  const slider = find("#layer"), play = find("#play"), layerName = find("#layer-name");
  const NS = "http://www.w3.org/2000/svg";
  const STEPS = 127; // of 1, as in keepsight.results.maps
  // From dark and cold to bright and warm, rising in lightness all the way, so that grey print tells the same.
  const COLOURS = [[0, 22, 24, 58], [0.25, 74, 42, 120], [0.5, 168, 58, 110], [0.75, 238, 122, 60], [1, 255, 236, 150]];
  const state = { picture: 0, at: [0.5, 0.5], layer: 0, layers: [], level: 0, hovered: null };

  if (!("DecompressionStream" in globalThis)) {
    find(".pictures").insertAdjacentHTML("beforebegin", "<p class=fine>This browser is too old to unpack the maps of similar patches; any of 2023 or later shows them.</p>");
    return;
  }

  const unpacked = new Map();
  async function unpack(picture, run) {
    const key = `${picture}-${run}`;
    const info = data.pictures[picture].maps[run];
    if (!info) return null;
    if (!unpacked.has(key)) {
      const bytes = Uint8Array.from(atob(document.getElementById("map-" + key).textContent), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
      const buffer = await new Response(stream).arrayBuffer();
      const { n, components } = info, layers = info.layers.length;
      let offset = 0;
      const take = (kind, count) => {
        const part = new kind(buffer, offset, count);
        offset += part.byteLength;
        return part;
      };
      unpacked.set(key, {
        ...info,
        boxes: take(Float32Array, 4 * n), top: take(Int32Array, info.spoken ? layers * n : 0), row: take(Int16Array, n), column: take(Int16Array, n),
        codes: take(Int8Array, layers * components * n), object: take(Uint8Array, n), whole: take(Uint8Array, n),
      });
    }
    return unpacked.get(key);
  }

  const shown = (map, token) => !Number.isNaN(map.boxes[4 * token]) && (!map.tiled || map.whole[token] === state.level);
  const centre = (map, token) => [map.boxes[4 * token] + map.boxes[4 * token + 2] / 2, map.boxes[4 * token + 1] + map.boxes[4 * token + 3] / 2];

  function nearest(map, [x, y]) {
    let best = -1, least = Infinity;
    for (let token = 0; token < map.n; token++) {
      if (!shown(map, token)) continue;
      const [cx, cy] = centre(map, token);
      const distance = ((cx - x) / map.boxes[4 * token + 2]) ** 2 + ((cy - y) / map.boxes[4 * token + 3]) ** 2;
      if (distance < least) { least = distance; best = token; }
    }
    return best;
  }

  function cosines(map, position, token) {
    const { n, components, codes } = map;
    const sums = new Float32Array(n);
    for (let k = 0; k < components; k++) {
      const start = (position * components + k) * n, own = codes[start + token];
      if (own) for (let i = 0; i < n; i++) sums[i] += own * codes[start + i];
    }
    for (let i = 0; i < n; i++) sums[i] = Math.max(-1, Math.min(1, sums[i] / (STEPS * STEPS)));
    sums[token] = 1;
    return sums;
  }

  function colour(share) {
    const at = Math.max(0, Math.min(1, share));
    const next = Math.max(1, COLOURS.findIndex((stop) => stop[0] >= at));
    const [a, b] = [COLOURS[next - 1], COLOURS[next]], t = (at - a[0]) / (b[0] - a[0]);
    return `rgb(${[1, 2, 3].map((i) => Math.round(a[i] + t * (b[i] - a[i]))).join(",")})`;
  }

  function make(name, attributes, parent) {
    const element = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent?.append(element);
    return element;
  }

  // Everything of a view that stays while layer and patch change.
  function stage(view) {
    const source = section.querySelector(`.pick[data-picture="${state.picture}"] svg`);
    const [, , width, height] = source.getAttribute("viewBox").split(" ").map(Number);
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "application", "aria-label": `${data.runs[view.run].label}: similarity of patches; arrow keys choose a patch, page up and page down the layer`, "aria-describedby": `said-${view.run}` });
    const picture = source.querySelector("image").cloneNode();
    picture.setAttribute("class", "under");
    svg.append(picture);
    const heat = make("g", { class: "heat" }, svg);
    view.cells = new Map();
    for (let token = 0; token < view.map.n; token++) {
      if (!shown(view.map, token)) continue;
      const [x, y, w, h] = view.map.boxes.subarray(4 * token, 4 * token + 4);
      view.cells.set(token, make("rect", { x: x * width, y: y * height, width: w * width, height: h * height, "data-token": token }, heat));
    }
    const all = make("g", { class: "outline all" }, svg);
    for (let i = 0; i < 2; i++) make("path", { d: source.querySelector(".outline path")?.getAttribute("d") || "" }, all);
    view.outline = make("g", { class: "outline" }, svg);
    for (let i = 0; i < 2; i++) make("path", {}, view.outline);
    view.ring = make("g", { class: "ring" }, svg);
    for (let i = 0; i < 2; i++) make("rect", {}, view.ring);
    view.svg = svg;
    view.element.querySelector(".stage").replaceChildren(svg);
    const token = (event) => event.target.dataset?.token;
    svg.addEventListener("click", (event) => {
      if (token(event) === undefined) return;
      state.at = centre(view.map, Number(token(event)));
      draw(true);
    });
    svg.addEventListener("pointermove", (event) => hover(token(event) === undefined ? null : centre(view.map, Number(token(event)))));
    svg.addEventListener("pointerleave", () => hover(null));
    svg.addEventListener("keydown", keys);
  }

  const number = (value) => value.toFixed(2).replace("-", "−");
  const word = (map, position, token) => (map.spoken ? ` · reads “${data.words[map.top[position * map.n + token]].replace(/^ /, "␣").replace(/\s/g, (space) => (space === " " ? " " : JSON.stringify(space).slice(1, -1)))}”` : "");
  const mean = (values) => (values.length ? number(values.reduce((a, b) => a + b, 0) / values.length) : null);

  function measure(view) {
    view.position = view.map ? view.map.layers.indexOf(state.layers[state.layer]) : -1;
    view.token = view.map ? nearest(view.map, state.at) : -1;
    view.values = view.position < 0 || view.token < 0 ? null : cosines(view.map, view.position, view.token);
  }

  function range() {
    if (find("input[name=scale]:checked").value === "fixed") return [0, 1];
    let low = Infinity, high = -Infinity;
    for (const { values, cells, token } of views) for (const i of values ? cells.keys() : []) {
      if (i !== token) { low = Math.min(low, values[i]); high = Math.max(high, values[i]); }
    }
    return low < high ? [low, high] : [0, 1];
  }

  function paint(view, [low, high]) {
    const { map, values, token, position } = view;
    const said = view.element.querySelector(".said");
    if (view.svg) view.svg.classList.toggle("blank", !values);
    if (!values) { said.textContent = map ? `no layer ${state.layers[state.layer]} in this run` : "no map of this picture in this run"; return; }
    for (const [i, cell] of view.cells) cell.setAttribute("fill", colour((values[i] - low) / (high - low)));
    const own = map.object[token];
    const paths = own ? data.pictures[state.picture].objects[own - 1] : "";
    for (const path of view.outline.children) path.setAttribute("d", paths);
    const cell = view.cells.get(token);
    for (const rect of view.ring.children) for (const name of ["x", "y", "width", "height"]) rect.setAttribute(name, cell.getAttribute(name));
    const others = (same) => mean([...view.cells.keys()].filter((i) => i !== token && (map.object[i] === own) === same).map((i) => values[i]));
    const split = own ? [["within its object", others(true)], ["elsewhere", others(false)]] : [["mean of all others", mean([...view.cells.keys()].filter((i) => i !== token).map((i) => values[i]))]];
    said.replaceChildren();
    for (const [name, value] of split) if (value !== null) {
      const strong = document.createElement("b");
      strong.textContent = value;
      said.append(name + " ", strong, "   ");
    }
    said.append(word(map, position, token).replace(" · ", ""));
    const small = document.createElement("small");
    const at = state.hovered && nearest(map, state.hovered);
    small.textContent = state.hovered && at !== token
      ? `row ${map.row[at] + 1}, column ${map.column[at] + 1}: ${number(values[at])}${word(map, position, at)}`
      : `row ${map.row[token] + 1}, column ${map.column[token] + 1}${own ? `, object ${own}` : ""}; cosines ± ${map.error[position].toFixed(3)}`;
    said.append(small);
  }

  function draw(aloud) {
    views.forEach(measure);
    const ends = range();
    views.forEach((view) => paint(view, ends));
    find(".bar .low").textContent = number(ends[0]);
    find(".bar .high").textContent = number(ends[1]);
    const layer = state.layers[state.layer];
    const depth = Math.max(...data.runs.map((run) => run.depth));
    slider.value = state.layer;
    layerName.textContent = `${layer} of ${depth}`;
    for (const view of views) {
      const { depth, preLayer } = data.runs[view.run];
      const name = layer === preLayer ? "PRe acts here" : layer === 0 ? "the language model's input" : layer === depth ? "the last" : "";
      view.element.querySelector(".place").textContent = `layer ${layer}` + (name && `, ${name}`);
    }
    slider.setAttribute("aria-valuetext", `layer ${layer}`);
    if (aloud) find("#spoken").textContent = `Layer ${layer}. ` + views.map((view) => `${data.runs[view.run].label}: ${view.element.querySelector(".said").textContent}`).join(". ");
  }

  function hover(place) {
    const same = place === state.hovered || (place && state.hovered && place[0] === state.hovered[0] && place[1] === state.hovered[1]);
    state.hovered = place;
    if (!same) draw(false);
  }

  function step(by) {
    state.layer = Math.max(0, Math.min(state.layers.length - 1, state.layer + by));
    draw(true);
  }

  function keys(event) {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const jump = { PageUp: 1, PageDown: -1 }[event.key];
    if ((!move && !jump) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    state.hovered = null; // a pointer that merely rests on the picture
    if (jump) return step(jump);
    const { map, token } = views.find((view) => view.svg === event.currentTarget);
    const [x, y] = centre(map, token);
    const next = nearest(map, [x + move[0] * map.boxes[4 * token + 2], y + move[1] * map.boxes[4 * token + 3]]);
    state.at = centre(map, next);
    draw(true);
  }

  async function open(picture) {
    const maps = await Promise.all(views.map((view) => unpack(picture, view.run)));
    const before = state.layers[state.layer];
    state.picture = picture;
    views.forEach((view, i) => (view.map = maps[i]));
    const known = views.filter((view) => view.map);
    state.layers = [...new Set(known.flatMap((view) => view.map.layers))].sort((a, b) => a - b);
    state.layer = Math.max(0, state.layers.indexOf(before));
    slider.max = state.layers.length - 1;
    find("#level").hidden = !known.some((view) => view.map.tiled);
    const first = known[0].map; // a patch well inside an object, where there is one
    const inside = [...Array(first.n).keys()].filter((token) => first.object[token] && shown(first, token));
    if (inside.length) state.at = centre(first, inside[inside.length >> 1]);
    for (const view of views) view.map ? stage(view) : (view.svg = null, view.element.querySelector(".stage").replaceChildren());
    for (const pick of picks) {
      const chosen = Number(pick.dataset.picture) === picture;
      pick.setAttribute("aria-pressed", String(chosen));
      if (chosen) find(".chosen").replaceChildren(...[...pick.closest("figure").querySelector("figcaption").childNodes].map((node) => node.cloneNode(true)));
    }
    marks();
    draw(false);
  }

  // Where the range's thumb stands at the layers at which PRe was trained.
  function marks() {
    const at = [...new Set(data.runs.map((run) => run.preLayer))].map((layer) => state.layers.indexOf(layer)).filter((position) => position >= 0);
    find(".marks").replaceChildren(...at.map((position) => {
      const mark = document.createElement("i");
      mark.textContent = "PRe";
      mark.style.setProperty("--at", position / Math.max(1, state.layers.length - 1));
      return mark;
    }));
  }

  let timer;
  function playing(on) {
    clearInterval(timer);
    timer = on ? setInterval(() => { state.layer = (state.layer + 1) % state.layers.length; draw(false); }, 450) : undefined;
    play.setAttribute("aria-pressed", String(on));
    play.textContent = on ? "Stop" : "Play";
  }

  play.addEventListener("click", () => playing(timer === undefined));
  slider.addEventListener("input", () => { playing(false); state.layer = Number(slider.value); draw(true); });
  section.querySelectorAll("input[name=scale]").forEach((input) => input.addEventListener("change", () => draw(true)));
  section.querySelectorAll("input[name=level]").forEach((input) => input.addEventListener("change", () => {
    state.level = Number(input.value);
    views.filter((view) => view.map).forEach(stage);
    draw(true);
  }));
  picks.forEach((pick) => pick.addEventListener("click", () => { playing(false); open(Number(pick.dataset.picture)); }));
  find(".bar i").style.background = `linear-gradient(90deg, ${COLOURS.map((stop) => colour(stop[0])).join(", ")})`;
  const middle = Math.max(...data.runs.map((run) => run.depth)) >> 1;
  find("#strip").classList.add("strip");
  find(".explorer").hidden = false;
  await open(Number(picks[0].dataset.picture));
  state.layer = Math.max(0, state.layers.indexOf(middle));
  draw(false);
  section.dataset.ready = "true";
})();
