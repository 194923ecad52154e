"use strict";
// The scatters of an attribution and the slider that chooses their layer; report.js draws with what this gives.
const keepsightAttribution = (data, { plain, colour, inkOf, symbolOf, axis, frame, redraw }) => {
  const section = document.getElementById("attribution");
  const { layers, courses } = data.attribution;
  const slider = document.getElementById("attribution-layer");
  const panels = Object.entries(data.panels).filter(([, panel]) => panel.scatter);
  let place = layers.indexOf(data.attribution.layer);

  // The same range at every layer, so that what moves is the points; room for the largest mark.
  function range(values) {
    const known = values.filter((value) => value !== null);
    if (!known.length) return [0, 1];
    const low = Math.min(...known), high = Math.max(...known);
    const room = 0.09 * (high - low || 0.1);
    return [low - room, high + room];
  }
  const times = (ends, scale) => ends.map((end) => end * scale);
  const skills = range(courses.flatMap((course) => course.y));
  const size = (i, n) => 6 + 7 * (n > 1 ? i / (n - 1) : 1);

  function traces(panel) {
    const scale = panel.percent ? 100 : 1;
    return courses.map((course, number) => {
      const ink = inkOf(course.number), n = course.points.length;
      const told = panel.x[place][number];
      return {
        x: told.map((value) => (value === null ? null : value * scale)),
        y: course.y.map((value) => (value === null ? null : value * 100)),
        mode: "lines+markers", connectgaps: false,
        line: { color: ink, width: 1.2 },
        marker: { symbol: symbolOf(course.number), size: told.map((_, i) => size(i, n)), opacity: 1, color: told.map((_, i) => (i ? ink : colour("--card"))), line: { color: told.map((_, i) => (i ? colour("--card") : ink)), width: told.map((_, i) => (i ? 1 : 1.8)) } },
        customdata: course.points.map((point, i) => `<b>${plain(course.label)}, ${plain(point)}</b><br>answered right  ${plain(course.text[i])}<br>layer ${layers[place]}  ${plain(panel.text[place][number][i])}`),
        hovertemplate: "%{customdata}<extra></extra>",
      };
    });
  }

  function layout(panel, target) {
    const scale = panel.percent ? 100 : 1;
    const wide = range(panel.x.flat(2));
    const chance = panel.chance !== null && panel.chance > wide[0] && panel.chance < wide[1] ? panel.chance * scale : null;
    const title = (text) => ({ text, font: { size: 11, color: colour("--faint") }, standoff: 4 });
    const shapes = [], annotations = [];
    if (chance !== null) {
      shapes.push({ type: "line", x0: chance, x1: chance, yref: "paper", y0: 0, y1: 1, line: { color: colour("--faint"), width: 1, dash: "dash" }, layer: "below" });
      annotations.push({ x: chance, xanchor: "left", yref: "paper", y: 1, yanchor: "bottom", text: "chance", showarrow: false, font: { size: 11, color: colour("--faint") } });
    }
    return {
      ...frame(target), shapes, annotations, hovermode: "closest", margin: { l: 58, r: 12, t: 18, b: 38 },
      xaxis: { ...axis(), range: times(wide, scale), nticks: 6, ticksuffix: panel.percent ? " %" : "", title: title(`${panel.title} at layer ${layers[place]}`) },
      yaxis: { ...axis(), range: times(skills, 100), nticks: 6, ticksuffix: " %", title: title("answered right") },
    };
  }

  // A line at the chosen layer in the figures that have layers on their axis.
  const mark = () => ({ type: "line", x0: layers[place], x1: layers[place], yref: "paper", y0: 0, y1: 1, line: { color: colour("--soft"), width: 1 }, layer: "below" });

  function tell() {
    const layer = layers[place];
    slider.value = place;
    slider.setAttribute("aria-valuetext", `layer ${layer}`);
    section.querySelector("output").textContent = `${layer} of ${layers[layers.length - 1]}`;
    section.querySelectorAll(".layer").forEach((element) => (element.textContent = layer));
    for (const [id, panel] of panels) {
      const figure = document.getElementById("figure-" + id);
      figure.querySelector(".told").textContent = panel.told[place];
      const texts = panel.text[place].flat();
      figure.querySelectorAll("td.cell").forEach((cell, i) => (cell.textContent = texts[i]));
    }
  }

  function choose(layer) {
    if (!layers.includes(layer) || layers[place] === layer) return;
    place = layers.indexOf(layer);
    tell();
    redraw(section);
    section.querySelector("#attribution-spoken").textContent = `Layer ${layer}. ` + panels.map(([id, panel]) => `${document.querySelector(`#figure-${id} h4`).textContent}: ${panel.told[place]}`).join(". ");
  }

  slider.max = layers.length - 1;
  slider.addEventListener("input", () => choose(layers[Number(slider.value)]));
  section.querySelector(".pin").hidden = false;
  tell();
  return { traces, layout, mark, choose };
};
