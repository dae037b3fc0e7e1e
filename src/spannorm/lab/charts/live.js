"use strict";
// Draws a page's numbers with Bokeh. Whatever text comes from a file is set as text, never as HTML.
const live = (() => {
  const REACH = 48; // pixels from the pointer within which a line answers
  const MANY = 100; // lines beyond which those of single seeds wait while a chart moves
  const REST = 400; // milliseconds after which a chart has stopped moving

  async function unpacked(element) {
    const bytes = Uint8Array.from(atob(element.textContent.trim()), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  // Bokeh itself, run once, when the first figure wants it.
  let loading = null;
  function library() {
    loading ??= unpacked(document.getElementById("library")).then((code) => {
      const script = document.createElement("script");
      script.textContent = code;
      document.head.append(script);
    });
    return loading;
  }

  const supported = () => "DecompressionStream" in window && document.getElementById("library") !== null;

  function element(tag, className, text = "") {
    const made = document.createElement(tag);
    made.className = className;
    made.textContent = text;
    return made;
  }

  function shown(value) {
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(3) : String(Number(value.toPrecision(5)));
  }

  const positive = (log) => (log ? (value) => value > 0 : () => true);

  // The first and last of the values that an axis can show.
  function extent(values, log) {
    let low = Infinity, high = -Infinity;
    for (const value of values)
      if (positive(log)(value)) { low = Math.min(low, value); high = Math.max(high, value); }
    return low <= high ? [low, high] : [1, 2];
  }

  class Chart {
    // host: where it is drawn. spec: numbers, as `interactive.Chart.to_json` writes them. names: a text for each arm.
    constructor(host, spec, names, hidden) {
      Object.assign(this, { host, spec, names, hidden, peers: [this], logX: false, logY: spec.y_log });
      this.place = element("div", "plot");
      this.tip = element("div", "tip");
      this.dot = element("div", "dot");
      host.chart = this;
      host.replaceChildren(this.controls(), this.place, this.dot, this.tip);
      this.leave();
    }

    controls() {
      const bar = element("div", "controls");
      const box = (name, label, checked) => {
        const input = element("input", name);
        Object.assign(input, { type: "checkbox", checked });
        const holder = element("label", "", label);
        holder.prepend(input);
        bar.append(holder);
        input.addEventListener("change", () => this.switchAxis(name, input.checked));
      };
      if (this.spec.group === "step") box("log-x", `log ${this.spec.x_name}`, this.logX);
      box("log-y", `log ${this.spec.y_name}`, this.logY);
      return bar;
    }

    // The horizontal axis is common to a group of charts; the vertical one is each chart's own.
    switchAxis(name, log) {
      if (name === "log-y") { this.logY = log; return this.draw(); }
      return Promise.all(this.peers.map((peer) => {
        peer.logX = log;
        const input = peer.host.querySelector("input.log-x");
        if (input) input.checked = log;
        return peer.draw();
      }));
    }

    *values(axis) {
      for (const line of this.spec.lines) yield* line[axis];
    }

    limits() {
      const x = extent(this.values("x"), this.logX);
      if (x[0] === x[1]) x[1] += 1;
      let [low, high] = this.spec.window;
      if (this.logY && !(low > 0)) {
        [low] = extent(this.values("y"), true);
        low /= 1.2;
        high = Math.max(high, 2 * low);
      }
      return { x, y: [low, high] };
    }

    async draw() {
      await library();
      const { x, y } = this.limits();
      const touch = matchMedia("(pointer: coarse)").matches;
      const figure = Bokeh.Plotting.figure({
        height: this.spec.height ?? 330, sizing_mode: "stretch_width", tools: "pan,box_zoom,wheel_zoom,reset,save",
        toolbar_location: "above", x_axis_type: this.logX ? "log" : "linear", y_axis_type: this.logY ? "log" : "linear",
        x_range: new Bokeh.Range1d({ start: x[0], end: x[1] }), y_range: new Bokeh.Range1d({ start: y[0], end: y[1] }),
        x_axis_label: this.spec.x_name, y_axis_label: this.spec.y_name,
        background_fill_color: null, border_fill_color: null, outline_line_color: null, min_border_right: 12,
      });
      figure.toolbar.logo = null;
      // A finger that moves over a chart scrolls the page; a mouse draws the box to magnify.
      if (touch) Object.assign(figure.toolbar, { active_drag: null, active_scroll: null });
      else figure.toolbar.active_drag = figure.toolbar.tools.find((tool) => tool.type === "BoxZoomTool") ?? "auto";
      for (const axis of figure.axes) Object.assign(axis, { axis_label_text_font_style: "normal", minor_tick_line_color: null });
      for (const grid of figure.center.filter((part) => part.type === "Grid")) grid.grid_line_color = "#e6e6e6";
      if (this.spec.level != null)
        figure.add_layout(new Bokeh.Span({ dimension: "width", location: this.spec.level, line_color: "#222222", line_dash: [2, 3] }));
      this.renderers = this.spec.looks.map((look, arm) => this.arm(figure, look, arm));
      figure.on_event("mousemove", (event) => this.answer(event));
      figure.on_event("tap", (event) => this.answer(event));
      figure.on_event("mouseleave", () => this.leave());
      figure.x_range.change.connect(() => this.moved());
      for (const range of [figure.x_range, figure.y_range]) range.change.connect(() => this.lighten());
      this.view?.remove();
      this.place.replaceChildren();
      this.figure = figure;
      this.show();
      this.view = await Bokeh.Plotting.show(figure, this.place);
      if (this.zoom && !(this.logX && this.zoom[0] <= 0)) this.setZoom(this.zoom);
      this.host.dataset.drawn = String(Number(this.host.dataset.drawn ?? 0) + 1);
      return this;
    }

    arm(figure, look, number) {
      const mine = this.spec.lines.filter((line) => line.arm === number);
      const made = [];
      for (const faint of [true, false]) {
        const lines = mine.filter((line) => line.faint === faint);
        if (lines.length)
          made.push(figure.multi_line(
            { field: "xs" }, { field: "ys" },
            { name: faint ? "faint" : "main", source: new Bokeh.ColumnDataSource({ data: { xs: lines.map((l) => l.x), ys: lines.map((l) => l.y) } }),
              line_color: look.color, line_dash: { value: look.dash }, line_alpha: faint ? 0.35 : 1, line_width: faint ? 1 : 1.8 }));
      }
      const points = (list, marker, size) => {
        if (list.length)
          made.push(figure.scatter(
            { field: "x" }, { field: "y" },
            { source: new Bokeh.ColumnDataSource({ data: { x: list.map((p) => p.x), y: list.map((p) => p.y) } }),
              marker, size, color: look.color, line_width: marker === "x" ? 3 : 1 }));
      };
      points(this.spec.marks.filter((mark) => mark.arm === number), "circle", 7);
      points(mine.filter((l) => l.failed).map((l) => ({ x: l.x.at(-1), y: l.y.at(-1) })), "x", 9);
      return made;
    }

    // Hides and shows arms as the legend says.
    show() {
      this.renderers?.forEach((made, arm) => {
        for (const renderer of made) {
          const visible = !this.hidden.has(arm) && !(this.moving && renderer.name === "faint");
          if (renderer.visible !== visible) renderer.visible = visible;
        }
      });
      this.leave();
    }

    // While a chart of hundreds of lines moves, it draws the means alone.
    lighten() {
      if (this.spec.lines.length <= MANY || !this.spec.lines.some((line) => line.faint)) return;
      clearTimeout(this.settling);
      this.settling = setTimeout(() => { this.moving = false; this.show(); }, REST);
      if (!this.moving) { this.moving = true; this.show(); }
    }

    moved() {
      const { start, end } = this.figure.x_range;
      if (this.zoom && this.zoom[0] === start && this.zoom[1] === end) return;
      this.leave();
      for (const peer of this.peers) {
        peer.zoom = [start, end];
        if (peer !== this && peer.figure && peer.logX === this.logX) peer.setZoom(peer.zoom);
      }
    }

    setZoom([start, end]) {
      const range = this.figure.x_range;
      if (range.start !== start || range.end !== end) range.setv({ start, end });
    }

    // Functions from data to pixels within the frame.
    scales() {
      const scale = (range, size, log) => {
        const of = log ? Math.log : (value) => value;
        const [start, end] = [of(range.start), of(range.end)];
        return (value) => ((of(value) - start) / (end - start)) * size;
      };
      const { x_range, y_range, inner_width, inner_height } = this.figure;
      return [scale(x_range, inner_width, this.logX), scale(y_range, inner_height, this.logY)];
    }

    // What lies nearest to a place of the chart, in pixels.
    nearest(event) {
      const [toX, toY] = this.scales();
      const at = [toX(event.x), toY(event.y)];
      let best = null;
      const consider = (line, x, y, extra) => {
        const [dx, dy] = [toX(x) - at[0], toY(y) - at[1]];
        const distance = Math.hypot(dx, dy);
        if (distance < (best?.distance ?? REACH)) best = { distance, line, x, y, sx: event.sx + dx, sy: event.sy - dy, ...extra };
      };
      for (const line of this.spec.lines) {
        if (this.hidden.has(line.arm)) continue;
        let low = 0, high = line.x.length - 1;
        while (low < high) {
          const middle = (low + high) >> 1;
          if (line.x[middle] < event.x) low = middle + 1; else high = middle;
        }
        for (let i = Math.max(0, low - 2); i <= Math.min(low + 1, line.x.length - 1); i++) consider(line, line.x[i], line.y[i]);
      }
      for (const mark of this.spec.marks) if (!this.hidden.has(mark.arm)) consider(mark, mark.x, mark.y, { y_name: mark.y_name });
      return best;
    }

    answer(event) {
      const found = this.nearest(event);
      if (!found) return this.leave();
      const { line } = found;
      const whose = line.mean ? `mean of ${line.mean} seeds` : line.seed != null ? `seed ${line.seed}` : "";
      const head = element("b", "", this.names[line.arm]);
      head.style.color = this.spec.looks[line.arm].color;
      const where = `${this.spec.x_name} ${shown(found.x)}`;
      this.tip.replaceChildren(head, ...[
        whose, line.at ? `${where}, ${line.at}` : where, `${found.y_name ?? this.spec.y_name} ${shown(found.y)}`,
      ].filter(Boolean).map((text) => element("span", "", text)));
      this.tip.hidden = this.dot.hidden = false;
      const top = this.place.offsetTop, width = this.host.clientWidth;
      Object.assign(this.dot.style, { left: `${found.sx}px`, top: `${top + found.sy}px`, borderColor: head.style.color });
      const left = Math.min(Math.max(4, found.sx + 12), width - this.tip.offsetWidth - 4);
      const over = left < found.sx + 10; // it would lie on the point: above it, then
      const up = found.sy - this.tip.offsetHeight - 14;
      Object.assign(this.tip.style, { left: `${left}px`, top: `${top + (over ? (up > 0 ? up : found.sy + 14) : found.sy + 10)}px` });
    }

    leave() {
      this.tip.hidden = this.dot.hidden = true;
    }
  }

  return { Chart, element, library, shown, supported, unpacked };
})();
