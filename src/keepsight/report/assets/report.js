"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const SYMBOLS = ["circle", "diamond", "square"];
  const DASHES = ["solid", "solid", "dot", "dash", "dashdot", "longdash"];
  const COLOURS = 6;

  // Plotly reads a little HTML in its texts; what comes from a run is to be shown as it is.
  const plain = (text) => String(text).replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const inkOf = (number) => colour("--c" + (number % COLOURS));
  const symbolOf = (number) => SYMBOLS[number % SYMBOLS.length];
  const transparent = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");

  // Straight pieces between known values: a band must not bridge a layer without one.
  function pieces(line) {
    const found = [[]];
    line.y.forEach((value, i) => (value === null ? found.push([]) : found[found.length - 1].push(i)));
    return found.filter((piece) => piece.length);
  }

  // A template of Plotly's takes % for its own.
  const literal = (text) => plain(text).replace(/%/g, "&#37;");
  const nameOf = (line) => (line.role === "run" ? data.runs[line.run].label : line.name);
  const namedLines = (view) => view.lines.filter((line) => line.role !== "chance");

  // The sample that all points of a view have; hovering then tells it once.
  function sampleOf(view) {
    const found = new Set(namedLines(view).flatMap((line) => line.sample));
    return found.size === 1 ? [...found][0] : "";
  }

  // What hovering tells of each point: on one line, or part below part where the figure is too narrow for that.
  function hovered(view, width) {
    const once = sampleOf(view);
    const parts = (line) => line.text.map((text, i) => [text, once ? "" : line.sample[i]].filter(Boolean));
    const letters = namedLines(view).flatMap((line) => parts(line).map((part) => [nameOf(line), ...part].join("  ").length));
    const between = 7 * Math.max(0, ...letters) + 20 > width ? "<br>" : "  ";
    return (line) => ({
      customdata: parts(line).map((part) => part.map(plain).join(between)),
      hovertemplate: (line.role === "run" ? "<b>" + literal(nameOf(line)) + "</b>" : literal(nameOf(line))) + between + "%{customdata}<extra></extra>",
    });
  }

  function traces(view, scale, width) {
    const times = (values) => values.map((value) => (value === null ? null : value * scale));
    const hover = hovered(view, width);
    const drawn = [];
    for (const line of view.lines) {
      const ink = inkOf(line.run);
      if (line.role === "chance") {
        drawn.push({ x: line.x, y: times(line.y), mode: "lines", line: { color: colour("--faint"), width: 1, dash: "dash" }, hoverinfo: "skip", showlegend: false });
        continue;
      }
      if (line.role === "control" || line.role === "part") {
        drawn.push({ x: line.x, y: times(line.y), mode: "lines", line: { color: transparent(ink, line.role === "part" ? 0.8 : 0.6), width: 1, dash: line.dash || "solid" }, ...hover(line) });
        continue;
      }
      for (const piece of pieces(line)) {
        const at = piece.map((i) => line.x[i]);
        const up = piece.map((i) => line.high[i] * scale);
        const down = piece.map((i) => line.low[i] * scale);
        drawn.push({ x: [...at, ...at.slice().reverse()], y: [...up, ...down.reverse()], fill: "toself", fillcolor: transparent(ink, 0.15), line: { width: 0 }, mode: "lines", hoverinfo: "skip" });
      }
      drawn.push({
        x: line.x, y: times(line.y), mode: "lines+markers", connectgaps: false, ...hover(line),
        line: { color: ink, width: 2, dash: line.solid ? "solid" : DASHES[line.run % DASHES.length] },
        marker: { color: ink, size: line.x.length > 20 ? 4 : 6.5, symbol: symbolOf(line.run) },
      });
    }
    return drawn;
  }

  function extent(panels) {
    let low = Infinity, high = -Infinity;
    for (const panel of panels) for (const view of panel.views) for (const line of view.lines) for (const values of [line.y, line.low || [], line.high || []]) for (const value of values) {
      if (value !== null) { low = Math.min(low, value); high = Math.max(high, value); }
    }
    const room = 0.06 * (high - low || 1);
    return [low - room, high + room];
  }
  const sharedPanels = Object.values(data.panels).filter((panel) => panel.shared);
  const sharedRange = sharedPanels.length ? extent(sharedPanels) : null;

  const axis = () => ({ gridcolor: colour("--grid"), linecolor: colour("--rule"), tickfont: { size: 11, color: colour("--soft") }, zeroline: false, fixedrange: true });
  const frame = (target) => ({
    width: target.clientWidth, height: target.clientHeight, // given, so that print and narrow windows fit at once
    margin: { l: 46, r: 12, t: 18, b: 36 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--ink") },
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--rule"), font: { size: 12, color: colour("--ink") } },
  });

  function layout(panel, view, scale, target) {
    const byLayer = panel.axis === "layer";
    const depth = byLayer ? Math.max(...data.runs.map((run) => run.depth), 1) : 100;
    const step = [1, 2, 4, 5, 10, 20].find((size) => depth / size <= 9) || 40;
    const shapes = [], annotations = [];
    const drawn = [...new Set(view.lines.filter((line) => byLayer && line.role === "run").map((line) => line.run))];
    const marks = [...new Set(drawn.map((number) => data.runs[number].preLayer).filter((layer) => layer !== null))];
    for (const layer of marks) {
      const number = drawn.find((number) => data.runs[number].preLayer === layer);
      const ink = inkOf(number);
      shapes.push({ type: "line", x0: layer, x1: layer, yref: "paper", y0: 0, y1: 1, line: { color: ink, width: 1, dash: "dot" }, layer: "below" });
      annotations.push({ x: layer, yref: "paper", y: 1, yanchor: "bottom", text: "PRe", showarrow: false, font: { size: 11, color: ink } });
    }
    const chance = view.lines.find((line) => line.role === "chance");
    if (chance) annotations.push({ x: depth, xanchor: "right", y: chance.y[0] * scale, yanchor: "bottom", text: "chance", showarrow: false, font: { size: 11, color: colour("--faint") } });
    const range = panel.range || (panel.shared && sharedRange ? sharedRange.map((value) => value * scale) : undefined);
    if (panel.range) shapes.push(attribution.mark());
    const nothing = view.lines.every((line) => line.y.every((value) => !value)); // left to itself the axis has 0 halfway
    return {
      ...frame(target), shapes, annotations, hovermode: "x unified",
      xaxis: { ...axis(), range: [-0.03 * depth - 0.1, 1.03 * depth + 0.1], dtick: step, tick0: 0, showgrid: false, ticks: "outside", ticklen: 4, tickcolor: colour("--rule"), title: { text: panel.axis, font: { size: 11, color: colour("--faint") }, standoff: 4 }, unifiedhovertitle: { text: [byLayer ? "layer %{x}" : "%{x} % kept", literal(sampleOf(view))].filter(Boolean).join("  ") } },
      yaxis: { ...axis(), range: range || (nothing ? [-0.06, 1] : undefined), zeroline: Boolean(panel.range), zerolinecolor: colour("--faint"), zerolinewidth: 1, nticks: 6, ticksuffix: panel.percent ? " %" : "" },
    };
  }

  const chosen = (section, what) => [...section.querySelectorAll(`input[data-select="${what}"]:checked`)].map((input) => input.value);

  function pick(panel, section) {
    const variants = chosen(section, "variant"), tokens = chosen(section, "tokens");
    const fits = (view) => 2 * (!tokens.length || tokens.includes(view.tokens)) + (!variants.length || variants.includes(view.variant));
    return panel.views.reduce((best, view) => (fits(view) > fits(best) ? view : best));
  }

  // The table below a figure, which the page opens with the first view in it, follows the selectors.
  function tabulate(figure, view) {
    const lines = view.lines.filter((line) => line.role === "run");
    const samples = new Set(lines.flatMap((line) => line.sample));
    const small = figure.querySelector("summary small");
    if (small) small.textContent = samples.size === 1 ? [...samples][0] : "";
    const cell = (name, text) => Object.assign(document.createElement(name), { textContent: text });
    const places = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    figure.querySelector("tbody").replaceChildren(...places.map((place) => {
      const row = document.createElement("tr");
      row.append(Object.assign(cell("th", place), { scope: "row" }), ...data.runs.map((_, number) => {
        const line = lines.find((one) => one.run === number), at = line ? line.x.indexOf(place) : -1;
        return cell("td", at < 0 ? "–" : [line.text[at], line.sample[at]].filter(Boolean).join("  "));
      }));
      return row;
    }));
  }

  function draw(target) {
    if (target.offsetParent === null) return; // folded away: drawn when it is opened
    const panel = data.panels[target.dataset.panel];
    if (panel.scatter) return Plotly.react(target, attribution.traces(panel), attribution.layout(panel, target), { displayModeBar: false });
    const section = target.closest("section");
    const view = pick(panel, section);
    const scale = panel.percent ? 100 : 1;
    Plotly.react(target, traces(view, scale, target.clientWidth), layout(panel, view, scale, target), { displayModeBar: false });
    if (panel.range && !target.dataset.clicks) {
      target.dataset.clicks = "true";
      target.on("plotly_click", (event) => attribution.choose(event.points[0].x));
    }
    const label = [view.variant, view.tokens === "all" ? "" : view.tokens].filter(Boolean).join(", ");
    const figure = target.closest("figure"), heading = figure.querySelector("h4");
    if (panel.views.length > 1) tabulate(figure, view);
    let small = heading.querySelector("small");
    if (label && !small) { small = document.createElement("small"); heading.append(" ", small); }
    if (small) small.textContent = label;
  }
  const redraw = (section) => section.querySelectorAll(".plot").forEach(draw);
  const attribution = data.attribution && keepsightAttribution(data, { plain, colour, inkOf, symbolOf, axis, frame, redraw });
  const drawAll = () => redraw(document);

  const { prefersDark, current, choose } = keepsightTheme; // from the script in the head
  const button = document.getElementById("theme");
  function setTheme(theme) {
    root.dataset.theme = theme;
    button.setAttribute("aria-pressed", String(theme === "dark"));
    button.textContent = theme === "dark" ? "Light" : "Dark";
    drawAll();
  }
  button.hidden = false;
  button.addEventListener("click", () => {
    choose(root.dataset.theme === "dark" ? "light" : "dark");
    setTheme(current());
  });
  prefersDark.addEventListener("change", () => setTheme(current()));
  let pending;
  addEventListener("resize", () => { clearTimeout(pending); pending = setTimeout(drawAll, 150); });
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details.more:not([open])")];
    folded.forEach((details) => (details.open = true));
    root.classList.add("printing");
    setTheme("light");
  });
  addEventListener("afterprint", () => {
    folded.forEach((details) => (details.open = false));
    root.classList.remove("printing");
    setTheme(current());
  });

  document.querySelectorAll("input[data-select]").forEach((input) => input.addEventListener("change", () => redraw(input.closest("section"))));
  document.querySelectorAll("details.more").forEach((details) => details.addEventListener("toggle", () => redraw(details)));
  document.querySelectorAll("button[data-svg]").forEach((save) => save.addEventListener("click", () => {
    const target = document.querySelector(`.plot[data-panel="${save.dataset.svg}"]`);
    Plotly.downloadImage(target, { format: "svg", filename: save.dataset.svg, width: target.clientWidth, height: target.clientHeight });
  }));
  const outlines = document.getElementById("outlines");
  outlines?.addEventListener("change", () => document.getElementById("explorer").classList.toggle("bare", !outlines.checked));
  const copy = document.getElementById("copy");
  if (navigator.clipboard) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(document.getElementById("quote").textContent);
      copy.textContent = "Copied";
    });
  }
  setTheme(current());
})();
