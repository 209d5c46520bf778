// One chart: uPlot with this page's axes, legend, zoom and keyboard.
import uPlot from "./uplot/uPlot.esm.js";
import { el, figure, keyed, text } from "./dom.js";

const SYNC = uPlot.sync("x");
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dark = matchMedia("(prefers-color-scheme: dark)");
export const zoom = { range: null, changed: () => {} };

function tickTexts(values, increment) {
  const largest = values.reduce((found, v) => Math.max(found, Math.abs(v ?? 0)), 0);
  if (largest && (largest < 1e-3 || largest >= 1e6)) {
    const digits = Math.max(0, Math.min(3, Math.ceil(Math.log10(largest / (increment || largest)) - 1e-9)));
    return values.map(v => v == null ? null : v === 0 ? "0" : v.toExponential(digits).replace("e+", "e").replace(/\.?0+e/, "e"));
  }
  const decimals = increment ? Math.max(0, Math.min(8, -Math.floor(Math.log10(increment) + 1e-9))) : 4;
  return values.map(v => v == null ? null : v.toLocaleString("en", increment ? { minimumFractionDigits: decimals, maximumFractionDigits: decimals } : { maximumSignificantDigits: 4 }));
}

/** Whether a tick of a log scale is 1 to 9 times a power of ten: the ends of the scale are none. */
function isRound(value) {
  const digit = value / 10 ** Math.floor(Math.log10(value) + 1e-9);
  return Math.abs(digit - Math.round(digit)) < 1e-6;
}

function clock(seconds, increment) {
  const when = new Date(1000 * seconds).toLocaleTimeString("en-GB");
  return increment < 60 ? when : when.slice(0, 5);
}

function nearest(u, series, index) {
  const y = u.data[series];
  for (let away = 0; away < y.length; away++) for (const i of [index - away, index + away]) if (y[i] != null) return i;
  return index;
}

export class Chart {
  constructor(parent, { id, title, unit, big, sign }) {
    this.legend = el("ul", { class: "legend" });
    this.plot = el("div", { class: "plot", tabindex: "0", role: "application", "aria-roledescription": "chart", "aria-describedby": "chart-help" });
    this.said = el("span", { class: "hidden", role: "status" });
    this.node = el("div", { class: `chart${big ? " big" : ""}`, id: `chart-${id}` },
      el("div", { class: "top" }, el("h3", {}, title, el("span", { class: "unit" }, unit)), this.legend), this.plot, this.said);
    Object.assign(this, { title, unit, sign: sign || figure, height: big ? 230 : 170, uplot: null, shape: "", lines: [] });
    parent.append(this.node);
    this.node.chart = this; // for tests, and for people at the browser's console
    this.plot.addEventListener("keydown", event => this._key(event));
    new ResizeObserver(() => this.uplot?.setSize({ width: this.plot.clientWidth, height: this.height })).observe(this.plot);
  }

  /** `lines`: {label, colour (a CSS variable), dash, faint, gaps, x, y}. `options`: {time, log, range, note}. */
  draw(lines, options) {
    this.options = options;
    this.lines = lines = lines.filter(line => line.x.length);
    const shape = JSON.stringify([lines.map(l => [l.label, l.colour, l.dash, l.faint, l.gaps, l.thin]), options.time, options.log, dark.matches, options.note]);
    if (!lines.length || shape !== this.shape) this._clear();
    this.shape = shape;
    if (!lines.length) {
      this.plot.style.height = `${this.height / 2}px`;
      this.plot.append(el("div", { class: "none" }, options.note || "No figures yet"));
      this.plot.setAttribute("aria-label", `${this.title}: ${options.note || "no figures yet"}`);
      return;
    }
    const data = lines.length === 1 ? [lines[0].x, lines[0].y] : uPlot.join(lines.map(line => [line.x, line.y]));
    if (options.log) for (let i = 1; i < data.length; i++) data[i] = data[i].map(v => v > 0 ? v : v == null ? v : null);
    if (this.uplot) this.uplot.setData(data);
    else this.uplot = new uPlot(this._options(lines, options), data, this.plot);
    this._tell();
    this.plot.setAttribute("aria-label", `${this.title}, ${this.unit}. ${lines.filter(l => !l.faint).map(l => `${l.label}: from ${this.sign(l.y[0])} to ${this.sign(l.y.at(-1))}`).join("; ")}`);
  }

  _clear() {
    this.uplot?.destroy();
    this.uplot = null;
    this.plot.replaceChildren();
    this.plot.style.height = "";
    this.legend.replaceChildren();
  }

  _options(lines, { time, log }) {
    const axis = { stroke: colour("--dim"), font: "12px system-ui, sans-serif", grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), size: 4 } };
    return {
      width: this.plot.clientWidth, height: this.height, legend: { show: false }, padding: [8, time ? 30 : 14, 0, 0],
      cursor: { sync: { key: SYNC.key, scales: ["x", null] }, y: false, drag: { x: true, y: false, setScale: false, dist: 5 }, dataIdx: nearest,
        points: { size: 7 }, bind: { dblclick: () => () => { zoom.changed(null); return null; } } },
      scales: {
        x: { time: false, range: () => zoom.range || this.options.range },
        y: { distr: log ? 3 : 1, range: (u, low, high) => this._range(low, high, log) },
      },
      axes: [
        { ...axis, size: 30, space: time ? 64 : 42, incrs: time ? [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400, 172800] :
          [1, 2, 5].flatMap(m => [...Array(7).keys()].map(p => m * 10 ** p)).sort((a, b) => a - b),
        values: (u, ticks, _a, _s, increment) => ticks.map(v => v == null ? null : time ? clock(v, increment) : v.toLocaleString("en")) },
        { ...axis, size: 62, space: log ? 22 : 34, values: (u, ticks, _a, _s, increment) => log ? tickTexts(ticks.map(v => isRound(v) ? v : null), 0) : tickTexts(ticks, increment) },
      ],
      series: [{}, ...lines.map(line => ({
        label: line.label, stroke: line.faint ? colour(line.colour) + "55" : colour(line.colour), width: line.thin ? 1.25 : 2, dash: line.dash,
        spanGaps: !line.gaps, points: { show: line.thin || line.faint ? false : undefined, size: 5, fill: colour(line.colour) },
      }))],
      hooks: { setCursor: [() => this._tell()], setSelect: [u => this._select(u)] },
    };
  }

  _range(low, high, log) {
    if (low == null || high == null) return log ? [0.1, 1] : [0, 1];
    if (log) return low === high ? [low / 1.5, high * 1.5] : [low / (high / low) ** 0.06, high * (high / low) ** 0.06];
    const margin = 0.07 * (high - low || Math.abs(high) || 1);
    return [low >= 0 && low - margin < 0 ? 0 : low - margin, high + margin];
  }

  _select(u) {
    const { left, width } = u.select;
    if (width <= 5) return;
    const range = [u.posToVal(left, "x"), u.posToVal(left + width, "x")];
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    zoom.changed(range);
  }

  /** The values at the cursor, else the last ones, beside the names of the lines. */
  _tell() {
    const u = this.uplot;
    if (!u) return;
    const at = u.cursor.idx;
    const shown = this.lines.map((line, i) => {
      const y = u.data[i + 1], index = at == null ? y.findLastIndex(v => v != null) : nearest(u, i + 1, at);
      return { ...line, i, value: y[index], x: u.data[0][index] };
    }).filter(line => !line.faint);
    keyed(this.legend, shown, line => line.i, line => el("li", {}, this._key_of(line), el("span"), " ", el("b")),
      (node, line) => { text(node.children[1], line.label); text(node.children[2], this.sign(line.value)); });
    if (at != null && this.plot.matches(":focus"))
      text(this.said, `${this.options.time ? clock(u.data[0][at], 1) : `step ${figure(u.data[0][at])}`}: ${shown.map(l => `${l.label} ${this.sign(l.value)}`).join(", ")}`);
  }

  _key_of(line) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), stroke = document.createElementNS("http://www.w3.org/2000/svg", "line");
    for (const [name, value] of Object.entries({ x1: 0, x2: 20, y1: 5, y2: 5, "stroke-width": 2, stroke: colour(line.colour), "stroke-dasharray": line.dash ? "5 3" : "none" })) stroke.setAttribute(name, value);
    svg.setAttribute("aria-hidden", "true");
    svg.append(stroke);
    return svg;
  }

  _key(event) {
    const u = this.uplot;
    if (!u || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const x = u.data[0], { min, max } = u.scales.x, by = (event.key === "ArrowLeft" ? -1 : 1) * (event.shiftKey ? Math.ceil(x.length / 20) : 1);
      let index = Math.max(0, Math.min(x.length - 1, u.cursor.idx == null ? x.length - 1 : u.cursor.idx + by));
      while (x[index] < min && index < x.length - 1) index++;
      while (x[index] > max && index > 0) index--;
      u.setCursor({ left: u.valToPos(x[index], "x"), top: 20 });
    } else if (event.key === "+" || event.key === "=") zoomBy(0.5, this);
    else if (event.key === "-") zoomBy(2, this);
    else if (event.key === "Escape" || event.key === "0") zoom.changed(null);
    else return;
    event.preventDefault();
  }
}

/** Zooms around the cursor of `chart`, else at the newest end. */
export function zoomBy(factor, chart) {
  if (!chart?.options?.range) return;
  const full = chart.options.range, [low, high] = zoom.range || full, u = chart.uplot;
  const width = Math.min((high - low) * factor, full[1] - full[0]), at = u?.cursor.idx == null ? high : u.data[0][u.cursor.idx];
  const share = (at - low) / (high - low || 1);
  const start = Math.max(full[0], Math.min(full[1] - width, at - share * width));
  zoom.changed(width >= full[1] - full[0] ? null : [start, start + width]);
}
