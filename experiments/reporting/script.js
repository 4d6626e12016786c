// The page's program: themes, plots, sliders, the config's filter. Nothing is fetched.
"use strict";
(() => {
  const root = document.documentElement;
  const COLORS = 8;
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const FEW = 60; // Points; more have a band instead of bars.
  const LABEL = 16; // Letters of a category's name in a line.
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const say = (text) => { document.getElementById("live").textContent = text; };
  const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\n/g, "<br>");
  // A category's name in lines short enough for an axis on a phone.
  const lined = (name) => {
    const lines = [""];
    for (const word of name.match(/[^-,=_]+[-,=_]*|[-,=_]+/g) || []) {
      if (lines.at(-1) && lines.at(-1).length + word.length > LABEL) lines.push("");
      lines[lines.length - 1] += word;
    }
    return lines.join("\n");
  };
  const read = (figure, name) => JSON.parse(figure.querySelector(`script.${name}`).textContent);

  class Plot {
    constructor(figure) {
      this.spec = read(figure, "spec");
      this.area = figure.querySelector(".area");
      this.tools = figure.querySelector(".tools");
      this.select = figure.querySelector("select");
      this.choose(0);
      this.area.on("plotly_relayout", (changed) => {
        if (Object.keys(changed).some((key) => key.includes("axis.range"))) this.redraw();
      });
      if (this.select) this.select.addEventListener("change", () => this.choose(Number(this.select.value)));
    }

    choose(number) {
      this.number = number;
      this.choice = this.spec.choices[number];
      this.x = this.choice.x || this.spec.x;
      this.log = { x: this.x.log && !!this.logged("x"), y: this.choice.y.log && !!this.logged("y") };
      this.draw();
      this.full = this.area.layout.xaxis.range.slice();
      this.makeTools();
    }

    // The curves of a series, with its band or bars.
    traces(series, seen) {
      const color = css(`--c${series.color % COLORS}`);
      const flipped = this.spec.flipped;
      const name = escaped(series.group || series.name);
      const first = !seen.has(name);
      seen.add(name);
      const names = series.x.map((x) => (typeof x === "string" ? escaped(lined(x)) : x));
      const trace = {
        type: "scatter",
        mode: { line: "lines", points: "markers", both: "lines+markers" }[series.kind],
        x: flipped ? series.y : names,
        y: flipped ? names : series.y,
        name,
        legendgroup: name,
        showlegend: first,
        opacity: series.faint ? 0.75 : 1,
        line: { color, width: series.faint ? 1.2 : 2, dash: DASHES[Math.floor(series.color / COLORS) % DASHES.length] },
        marker: { color, size: series.faint || series.x.length > FEW ? 6 : 8 },
        hovertemplate: `${series.hover ? "%{text}" : flipped ? "%{y}" : escaped(series.name)}: %{${flipped ? "x" : "y"}:.5g}<extra></extra>`,
      };
      if (series.hover) trace.text = series.hover.map(escaped);
      if (!series.error) return [trace];
      trace.marker.symbol = series.error.map((e) => (e === null ? "circle-open" : "circle"));
      if (series.kind === "line" && series.x.length > FEW) return [this.band(series, color, name), trace];
      trace[flipped ? "error_x" : "error_y"] = {
        type: "data", array: series.error.map((e) => e || 0), color, thickness: 1.2, width: series.x.length > FEW ? 0 : 4,
      };
      return [trace];
    }

    band(series, color, name) {
      const kept = series.x.map((_, k) => k).filter((k) => series.y[k] !== null && series.error[k] !== null);
      const back = [...kept].reverse();
      const low = (k) => {
        const value = series.y[k] - series.error[k];
        return this.log.y && value <= 0 ? series.y[k] / 10 : value;
      };
      return {
        type: "scatter", mode: "lines", fill: "toself", hoverinfo: "skip", showlegend: false, legendgroup: name,
        x: [...kept, ...back].map((k) => series.x[k]),
        y: [...kept.map((k) => series.y[k] + series.error[k]), ...back.map(low)],
        line: { width: 0, color }, fillcolor: `${color}40`,
      };
    }

    axis(title, log, range) {
      return {
        title: { text: escaped(title), standoff: 8 }, type: log ? "log" : undefined, range, automargin: true,
        ...(log ? this.decades(range) : {}), gridcolor: css("--grid"), linecolor: css("--strong-edge"), zerolinecolor: css("--grid"),
        exponentformat: "power", nticks: innerWidth < 500 ? 5 : 8,
      };
    }

    // Where ticks go on a logarithmic axis, by how many powers of ten it spans.
    decades([from, to]) {
      if (to - from < 0.8) return { tickformat: "~g" };
      return to - from < 3 ? { dtick: "D2", tickformat: "~g" } : { dtick: Math.ceil((to - from) / 7) };
    }

    // The range of an axis' values > 0, as powers of ten, with an edge; undefined if there are none.
    logged(axis) {
      const positive = this.choice.series.flatMap((s) => s[axis]).filter((value) => value > 0).map(Math.log10);
      if (!positive.length) return undefined;
      const low = positive.reduce((a, b) => Math.min(a, b));
      const high = positive.reduce((a, b) => Math.max(a, b));
      const edge = 0.04 * (high - low) || 0.1;
      return [low - edge, high + edge];
    }

    draw(ranges = {}) {
      const { spec, choice } = this;
      const flipped = spec.flipped;
      const seen = new Set();
      const traces = choice.series.flatMap((series) => this.traces(series, seen));
      const categories = new Set(flipped ? choice.series.flatMap((s) => s.x.map(lined)) : []);
      const whole = (axis) => (this.log[axis] ? this.logged(axis) : undefined);
      const value = this.axis(choice.y.title, this.log.y, (flipped ? ranges.x : ranges.y) || whole("y"));
      const along = this.axis(flipped ? "" : this.x.title, this.log.x, flipped ? undefined : ranges.x || whole("x"));
      if (flipped) Object.assign(along, { type: "category", autorange: "reversed", nticks: undefined, tickmode: "linear", dtick: 1, tickfont: { size: 12 } });
      const lines = [...categories].reduce((sum, name) => sum + Math.max(2, name.split("\n").length), 0);
      const layout = {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: css("--text") },
        margin: { l: 48, r: 14, t: 10, b: 40 }, height: (flipped ? 110 + 17 * lines : 330) + this.legendHeight([...seen]),
        xaxis: flipped ? value : along, yaxis: flipped ? along : value,
        showlegend: seen.size > 1,
        legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", maxheight: 2000, uirevision: `${this.number}`, font: { size: 12 } },
        hovermode: flipped || seen.size > COLORS ? "closest" : "x unified",
        hoverlabel: { bgcolor: css("--card"), bordercolor: css("--strong-edge"), font: { color: css("--text") } },
        dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
        modebar: { remove: ["all"] },
      };
      Plotly.react(this.area, traces, layout, { displayModeBar: false, responsive: true, displaylogo: false });
    }

    // What the legend above a plot takes beyond its first line.
    legendHeight(names) {
      const context = document.createElement("canvas").getContext("2d");
      context.font = `12px ${getComputedStyle(document.body).fontFamily}`;
      const space = this.area.clientWidth - 90;
      let lines = 1;
      let used = 0;
      for (const name of names) {
        const width = context.measureText(name).width + 45; // With its line and the gap.
        if (used && used + width > space) [lines, used] = [lines + 1, 0];
        used += width;
      }
      return 29 * (lines - 1);
    }

    // The same view in the colours of the theme.
    redraw() {
      const range = (axis) => (axis.autorange ? undefined : axis.range.slice());
      this.draw({ x: range(this.area.layout.xaxis), y: range(this.area.layout.yaxis) });
    }

    makeTools() {
      const { spec, choice } = this;
      const wanted = [
        ["+", "Zoom in", () => this.zoom(0.5, 0)],
        ["−", "Zoom out", () => this.zoom(2, 0)],
        ["←", "Move left", () => this.zoom(1, -0.25)],
        ["→", "Move right", () => this.zoom(1, 0.25)],
        ["Reset", "Reset the view", () => { this.draw(); say("The whole range"); }],
      ];
      if (!spec.flipped && this.logged("x")) wanted.push(["log x", "Logarithmic x", "x"]);
      if (this.logged("y")) wanted.push([spec.flipped ? "log" : "log y", "Logarithmic values", "y"]);
      const buttons = wanted.map(([text, label, action], k) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = text;
        button.title = label;
        if (text.length === 1) button.setAttribute("aria-label", label);
        button.tabIndex = k ? -1 : 0;
        if (typeof action === "string") {
          button.setAttribute("aria-pressed", this.log[action]);
          button.addEventListener("click", () => this.toggle(action, button));
        } else {
          button.addEventListener("click", action);
        }
        return button;
      });
      this.tools.replaceChildren(...buttons);
      this.tools.onkeydown = (event) => {
        const move = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
        const at = buttons.indexOf(document.activeElement);
        if (move === undefined || at < 0) return;
        event.preventDefault();
        const to = Math.min(buttons.length - 1, Math.max(0, at + move));
        buttons[at].tabIndex = -1;
        buttons[to].tabIndex = 0;
        buttons[to].focus();
      };
    }

    toggle(axis, button) {
      this.log[axis] = !this.log[axis];
      button.setAttribute("aria-pressed", this.log[axis]);
      this.draw();
      this.full = this.area.layout.xaxis.range.slice();
      say(`${axis} is ${this.log[axis] ? "logarithmic" : "linear"}`);
    }

    // Horizontally; the vertical range follows what is to be seen.
    zoom(factor, shift) {
      const [from, to] = this.area.layout.xaxis.range;
      const width = to - from;
      const half = (width * factor) / 2;
      const middle = (from + to) / 2 + shift * width;
      if (factor > 1 && 2 * half >= this.full[1] - this.full[0]) return void this.draw();
      const range = [middle - half, middle + half];
      const horizontal = this.spec.flipped ? this.log.y : this.log.x;
      this.draw({ x: range, y: this.spec.flipped ? undefined : this.fitted(range) });
      const shown = range.map((value) => Number((horizontal ? 10 ** value : value).toPrecision(3)));
      say(`From ${shown[0]} to ${shown[1]}`);
    }

    fitted([from, to]) {
      const seen = this.choice.series.flatMap((s) => s.y.filter((y, k) => {
        const x = this.log.x ? Math.log10(s.x[k]) : s.x[k];
        return y !== null && x >= from && x <= to && (y > 0 || !this.log.y);
      })).map((y) => (this.log.y ? Math.log10(y) : y));
      if (seen.length < 2) return undefined;
      const low = seen.reduce((a, b) => Math.min(a, b));
      const high = seen.reduce((a, b) => Math.max(a, b));
      const edge = 0.06 * (high - low) || Math.abs(high) * 0.01 || 1;
      return [low - edge, high + edge];
    }
  }

  function makeSlider(figure) {
    const { sources, texts } = read(figure, "frames");
    const image = figure.querySelector("img");
    const range = figure.querySelector("input");
    const output = figure.querySelector("output");
    const button = figure.querySelector("button");
    let playing = 0;
    const show = () => {
      const k = Number(range.value);
      image.src = sources[k];
      image.alt = `${image.dataset.alt}, ${texts[k]}`;
      output.textContent = texts[k];
      range.setAttribute("aria-valuetext", texts[k]);
    };
    const stop = () => {
      clearInterval(playing);
      playing = 0;
      button.textContent = "Play";
    };
    const next = () => {
      if (range.value === range.max) return stop();
      range.value = Number(range.value) + 1;
      show();
    };
    range.addEventListener("input", () => { stop(); show(); });
    button.addEventListener("click", () => {
      if (playing) return stop();
      if (range.value === range.max) range.value = 0;
      show();
      button.textContent = "Stop";
      playing = setInterval(next, Math.max(80, Math.min(600, 6000 / sources.length)));
    });
    show(); // A browser may have kept the place of an earlier visit.
  }

  function makeFilter() {
    const table = document.getElementById("config-table");
    if (!table) return;
    const filter = document.getElementById("config-filter");
    const differs = document.getElementById("config-differs");
    const rows = [...table.tBodies[0].rows];
    const apply = () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = (differs.checked && !row.classList.contains("differs")) || !words.every((word) => text.includes(word));
      }
      document.getElementById("config-count").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} keys`;
    };
    filter.addEventListener("input", apply);
    differs.addEventListener("change", apply);
    apply();
  }

  const plots = [...document.querySelectorAll(".plot")].flatMap((figure) => {
    try {
      return [new Plot(figure)];
    } catch (error) {
      console.error(error);
      figure.querySelector(".area").textContent = `This plot cannot be drawn: ${error.message}`;
      return [];
    }
  });
  document.querySelectorAll(".slider").forEach(makeSlider);
  makeFilter();

  const toggle = document.getElementById("theme");
  function setTheme(theme) {
    root.dataset.theme = theme;
    toggle.setAttribute("aria-pressed", theme === "dark");
    plots.forEach((plot) => plot.redraw());
  }
  toggle.setAttribute("aria-pressed", root.dataset.theme === "dark");
  toggle.addEventListener("click", () => {
    const theme = root.dataset.theme === "dark" ? "light" : "dark";
    setTheme(theme);
    try { localStorage.setItem("ddpm_jax-theme", theme); } catch { /* Not kept, then. */ }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => {
    let chosen = null;
    try { chosen = localStorage.getItem("ddpm_jax-theme"); } catch { /* Not allowed. */ }
    if (!chosen) setTheme(event.matches ? "dark" : "light");
  });
  let before = root.dataset.theme;
  addEventListener("beforeprint", () => { before = root.dataset.theme; setTheme("light"); });
  addEventListener("afterprint", () => setTheme(before));
})();
