// The explorer: looks up what the theory computed for the stack that is chosen, and draws it.
if (live.supported()) {
  const COLORS = ["#d55e00", "#0072b2", "#009e73", "#b3478c", "#b07a00", "#4b3b9b", "#7a1f2b", "#6f6f6f"];
  const form = document.getElementById("choice").elements;
  const charts = {};

  function options(select, values, wanted) {
    select.replaceChildren(...values.map((value) => new Option(value, value)));
    select.value = values.map(String).includes(String(wanted)) ? wanted : values[0];
  }

  const distinct = (values) => [...new Set(values)];

  // A chart's numbers from curves by name; unknown values leave a curve out of that block.
  function spec(blocks, curves, yName) {
    const names = Object.keys(curves);
    const lines = names.map((name, arm) => {
      const known = blocks.map((block, i) => [block, curves[name][i]]).filter(([, value]) => value > 0);
      return { arm, seed: null, faint: false, failed: false, x: known.map((k) => k[0]), y: known.map((k) => k[1]) };
    }).filter((line) => line.x.length);
    const values = lines.flatMap((line) => line.y);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    return {
      names,
      group: "block", x_name: "block", y_name: yName, y_log: true, window: [Math.min(low / 1.3, 0.5), Math.max(high * 1.3, 2)],
      lines, marks: [], level: null, looks: names.map((_, i) => ({ color: COLORS[i % COLORS.length], dash: i < COLORS.length ? [] : [6, 3] })),
    };
  }

  function legend(part, chart) {
    part.querySelector(".names").replaceChildren(...chart.names.map((name, arm) => {
      const button = live.element("button", "", `— ${name}`);
      button.type = "button";
      button.style.color = chart.spec.looks[arm].color;
      button.setAttribute("aria-pressed", String(!chart.hidden.has(arm)));
      button.addEventListener("click", () => {
        if (!chart.hidden.delete(arm)) chart.hidden.add(arm);
        button.setAttribute("aria-pressed", String(!chart.hidden.has(arm)));
        chart.show();
      });
      return button;
    }));
  }

  async function draw(id, blocks, curves, yName) {
    const part = document.getElementById(id), numbers = spec(blocks, curves, yName);
    part.classList.add("answering");
    charts[id] ??= new live.Chart(part.querySelector(".live"), numbers, numbers.names, new Set());
    const chart = charts[id];
    chart.peers = Object.values(charts);
    if (String(chart.names) !== String(numbers.names)) chart.hidden.clear();
    Object.assign(chart, { spec: numbers, names: numbers.names, zoom: null });
    legend(part, chart);
    await chart.draw();
  }

  const start = async () => {
    const { entries, widths } = JSON.parse(await live.unpacked(document.querySelector(".numbers")));
    const pick = (list, key, value) => list.filter((entry) => entry[key] === value);
    let depths = [], drawing = Promise.resolve();

    function update() {
      let left = pick(entries, "placement", form.placement.value);
      options(form.rule, distinct(left.map((e) => e.rule)), form.rule.value);
      left = pick(left, "rule", form.rule.value);
      const before = depths[form.depth.value];
      depths = distinct(left.map((e) => e.depth)).sort((a, b) => a - b);
      form.depth.max = depths.length - 1;
      form.depth.value = Math.max(0, depths.indexOf(before));
      show();
    }

    function show() {
      const depth = depths[form.depth.value];
      form.blocks.value = depth;
      form.depth.setAttribute("aria-valuetext", `${depth} blocks`);
      const width = form.width ? Number(form.width.value) : widths[0];
      const entry = entries.find((e) => e.placement === form.placement.value && e.rule === form.rule.value && e.depth === depth && e.width === width);
      const reason = document.getElementById("reason");
      reason.hidden = !entry.unpredicted;
      reason.textContent = entry.unpredicted ? `The theory says nothing about ${entry.placement}: ${entry.unpredicted}` : "";
      document.getElementById("words").replaceChildren(...(entry.words ?? []).map((words) => live.element("li", "", words)));
      for (const part of document.querySelectorAll(".part")) part.hidden = Boolean(entry.unpredicted);
      if (entry.unpredicted) return;
      // One after the other: a slider may ask for more than a browser draws at once.
      drawing = drawing.then(async () => {
        if (depth !== depths[form.depth.value]) return;
        await draw("variance", entry.blocks, entry.variance, "variance");
        await draw("gradient", entry.blocks, { "whole gradient": entry.gradient, "skip path": entry.skip }, "gradient");
        document.body.dataset.shown = [entry.placement, entry.rule, entry.depth, entry.width].join("|");
      });
    }

    options(form.placement, distinct(entries.map((e) => e.placement)));
    if (form.width) options(form.width, widths);
    form.placement.addEventListener("change", update);
    form.rule.addEventListener("change", update);
    form.depth.addEventListener("input", show);
    form.width?.addEventListener("change", show);
    update();
  };
  start();
}
