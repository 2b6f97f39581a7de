"use strict";
// Draws the charts of the page from its data; needs d3 and Plot, and nothing of the network.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const COLOURS = 8;
  const DASHES = ["", "7 3", "2 3", "9 3 2 3", "12 4"];
  const SYMBOLS = ["circle", "square", "triangle", "diamond", "cross", "star", "wye", "times"];
  const LABELLED = 45; // lines of a chart that have a label at their end
  const MARKED = 12; // symbols on a line
  const LABEL_HEIGHT = 12;
  const hidden = new Set(); // numbers of the runs that are switched off
  const styleOf = (i) => ({
    stroke: `var(--c${i % COLOURS})`,
    dash: DASHES[i % DASHES.length],
    symbol: SYMBOLS[i % SYMBOLS.length],
  });
  const short = (value) => d3.format(Math.abs(value) >= 10000 ? ".3s" : ".4~g")(value);

  function pointsOf(run, name) {
    const curve = name && data.runs[run].curves[name];
    return curve ? curve[0].map((step, i) => ({ step, value: curve[1][i] })) : [];
  }

  function lineOf(line, index) {
    const run = data.runs[line.run];
    const train = pointsOf(line.run, line.train);
    const val = pointsOf(line.run, line.val);
    const low = pointsOf(line.run, `${line.val}_low`);
    const high = pointsOf(line.run, `${line.val}_high`);
    return {
      ...line,
      ...styleOf(line.name ? index : line.run),
      title: line.name || `run ${line.run + 1}: ${run.name}`,
      label: line.name || `${line.run + 1}`,
      train,
      val,
      band: low.length === high.length ? low.map((p, i) => ({ step: p.step, low: p.value, high: high[i].value })) : [],
      holes: [...new Set([...(run.holes[line.train] || []), ...(run.holes[line.val] || [])])],
    };
  }

  function marksOf(line) {
    const main = line.val.length ? line.val : line.train;
    const every = Math.max(1, Math.ceil(main.length / MARKED));
    const some = main.filter((_, i) => (main.length - 1 - i) % every === 0);
    const stroke = { stroke: line.stroke, strokeDasharray: line.dash };
    const at = { x: "step", y: "value" };
    return [
      Plot.areaY(line.band, { x: "step", y1: "low", y2: "high", fill: line.stroke, fillOpacity: 0.15 }),
      line.val.length ? Plot.line(line.train, { ...at, ...stroke, strokeWidth: 1, strokeOpacity: 0.55 }) : null,
      Plot.line(main, { ...at, ...stroke, strokeWidth: 2 }),
      Plot.dot(some, { ...at, symbol: line.symbol, stroke: line.stroke, fill: "var(--paper)", r: 3.2 }),
      Plot.text(line.holes, {
        x: (step) => step, text: () => "×", frameAnchor: "top", dy: 6, fill: line.stroke, fontSize: 14,
        title: (step) => `${line.title}\nnot finite at step ${step.toLocaleString("en")}`,
      }),
    ];
  }

  function addLabels(svg, lines, x, y) {
    const ends = lines
      .map((line) => ({ line, last: (line.val.length ? line.val : line.train).at(-1) }))
      .filter(({ last }) => last)
      .map(({ line, last }) => ({ line, x: x.apply(last.step), y: y.apply(last.value), at: y.apply(last.value) }))
      .sort((a, b) => a.y - b.y);
    const lowest = Math.max(...y.range);
    ends.forEach((end, i) => { if (i) end.at = Math.max(end.at, ends[i - 1].at + LABEL_HEIGHT); });
    for (let i = ends.length - 1, room = lowest; i >= 0; i--, room -= LABEL_HEIGHT) {
      ends[i].at = Math.min(ends[i].at, room);
      room = ends[i].at;
    }
    const right = Math.max(...x.range);
    const group = d3.select(svg).append("g").attr("class", "ends").attr("aria-hidden", "true");
    for (const end of ends) {
      const x = end.x < right - 40 ? end.x + 8 : right + 8; // beside a line that ends early, else in the margin
      group.append("path").attr("d", `M${end.x + 4},${end.y}L${x - 2},${end.at}`)
        .attr("stroke", end.line.stroke).attr("stroke-width", 0.6).attr("fill", "none");
      group.append("text").attr("x", x).attr("y", end.at).attr("dy", "0.35em").attr("text-anchor", "start")
        .attr("fill", end.line.stroke).text(end.line.label);
    }
  }

  function draw(figure) {
    const panel = data.panels[Number(figure.dataset.panel)];
    const place = figure.querySelector(".plot");
    const lines = panel.lines.filter((line) => !hidden.has(line.run)).map((line) => lineOf(line, panel.lines.indexOf(line)));
    const drawn = lines.filter((line) => line.train.length || line.val.length);
    const longest = Math.max(1, ...lines.map((line) => line.label.length));
    const all = lines.flatMap((line) => [...line.train, ...line.val].map((p) => ({ ...p, title: line.title })));
    const phases = lines.flatMap((line) => data.runs[line.run].phase_ends);
    const labelled = drawn.length <= LABELLED;
    const width = Math.max(260, place.clientWidth);
    const svg = Plot.plot({
      width,
      height: Math.max(250, labelled ? drawn.length * LABEL_HEIGHT + 70 : 0),
      marginLeft: 52,
      marginRight: labelled ? Math.min(width / 3, 18 + 6.5 * longest) : 16,
      style: { background: "transparent", color: "inherit", fontSize: "11px", overflow: "visible" },
      x: { label: "step", ticks: width / 90, tickFormat: (n) => (n >= 10000 ? d3.format(".3~s")(n) : `${n}`), nice: false },
      y: { label: null, grid: true, ...(panel.top === null ? { nice: true } : { domain: [0, panel.top] }),
        tickFormat: short, zero: false },
      marks: [
        Plot.ruleX(phases, { strokeOpacity: 0.5, strokeDasharray: "1 3" }),
        ...lines.flatMap(marksOf),
        Plot.tip(all, Plot.pointer({
          x: "step", y: "value", fill: "var(--paper)", stroke: "currentColor",
          title: (p) => `${p.title}\nstep ${p.step.toLocaleString("en")}: ${p.value}`,
        })),
      ],
    });
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `${panel.title}: ${drawn.map((line) =>
      `${line.title} ends at ${(line.val.length ? line.val : line.train).at(-1).value}`).join("; ")}`);
    if (labelled && drawn.length) addLabels(svg, drawn, svg.scale("x"), svg.scale("y"));
    place.replaceChildren(svg);
    const key = figure.querySelector(".key");
    if (key) key.replaceChildren(...lines.map((line) => keyOf(line, line.title)));
  }

  function swatch(line) {
    const svg = d3.create("svg").attr("width", 34).attr("height", 12).attr("aria-hidden", "true");
    svg.append("line").attr("x1", 1).attr("x2", 33).attr("y1", 6).attr("y2", 6).attr("stroke", line.stroke)
      .attr("stroke-width", 2).attr("stroke-dasharray", line.dash);
    svg.append("path").attr("d", d3.symbol(d3[`symbol${line.symbol[0].toUpperCase()}${line.symbol.slice(1)}`], 40)())
      .attr("transform", "translate(17 6)").attr("stroke", line.stroke).attr("fill", "var(--paper)");
    return svg.node();
  }

  function keyOf(line, text) {
    const item = document.createElement("span");
    item.append(swatch(line), ` ${text}`);
    return item;
  }

  const figures = [...document.querySelectorAll("figure[data-panel]")];
  let waiting = 0;
  const drawAll = () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => figures.forEach(draw));
  };
  const boxes = [...document.querySelectorAll("[data-run] input")];
  document.querySelectorAll("[data-run] .swatch").forEach((place, run) => place.replaceChildren(swatch(styleOf(run))));
  document.querySelector("#all").addEventListener("change", (event) => {
    boxes.forEach((box) => { box.checked = event.target.checked; });
  });
  document.querySelector("#runs").addEventListener("change", () => {
    boxes.forEach((box, run) => hidden[box.checked ? "delete" : "add"](run));
    drawAll();
  });
  figures.forEach(draw);
  let width = document.documentElement.clientWidth;
  addEventListener("resize", () => {
    if (width !== document.documentElement.clientWidth) drawAll();
    width = document.documentElement.clientWidth;
  });
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));
})();
