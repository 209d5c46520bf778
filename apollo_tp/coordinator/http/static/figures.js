// The charts: which figures of which jobs, over steps or time; latency of the server beside them.
import { Chart, zoom, zoomBy } from "./chart.js";
import { $, figure, moment, number, show, text } from "./dom.js";
import { curveOf, latency, mean, smoothed } from "./series.js";
import { nameOf, shownJobs } from "./state.js";

const ms = value => value == null ? "–" : `${figure(value, 3)} ms`;
const CHARTS = [
  { id: "loss", title: "Loss", unit: "nats per token", big: true, figures: [["loss", "training"], ["valid_loss", "validation", true]] },
  { id: "latency", title: "Inference latency", unit: "ms between tokens, from the server", big: true, latency: "inter_token_seconds", sign: ms },
  { id: "first-token", title: "Time to first token", unit: "ms, from the server", latency: "first_token_seconds", sign: ms },
  { id: "speed", title: "Training speed", unit: "tokens per second", figures: [["tokens_per_second", "training"]], sign: v => number(v) },
  { id: "reward", title: "Mean reward", unit: "", figures: [["reward", "training"], ["valid_reward", "validation", true]] },
  { id: "accuracy", title: "Token accuracy", unit: "share of arg-max hits", figures: [["accuracy", "training"], ["valid_accuracy", "validation", true]] },
  { id: "mismatch", title: "Mismatch of trainer and server", unit: "KL, nats per token", figures: [["mismatch_kl", "training"]] },
  { id: "margin", title: "Reward margin", unit: "DPO, nats", figures: [["reward_margin", "training"]] },
  { id: "norm", title: "Gradient norm", unit: "before clipping", figures: [["grad_norm", "training"]] },
  { id: "rate", title: "Learning rate", unit: "", figures: [["learning_rate", "training"]], raw: true },
];
const DASH = [6, 4];
const charts = new Map();
let drawn = "";

function distinctNames(jobs) {
  const names = jobs.map(nameOf);
  return names.map((name, i) => names.indexOf(name) === names.lastIndexOf(name) ? name : `${name}, ${moment(jobs[i].started_at || jobs[i].created_at)}`);
}

function figureLines(spec, jobs, { over, smoothing }) {
  const lines = [], several = jobs.length > 1, names = distinctNames(jobs);
  jobs.forEach((job, i) => {
    const colour = `--c${i % 6}`, name = names[i];
    for (const [key, label, valid] of spec.figures) {
      const column = curveOf(job.id).of(key), x = column[over];
      const shown = several ? (valid ? `${name}, ${label}` : name) : label;
      const base = { label: shown, colour, x };
      if (valid) lines.push({ ...base, dash: DASH, y: column.y, colour: several ? colour : "--c5" });
      else if (smoothing > 0 && !spec.raw) lines.push({ ...base, y: column.y, faint: true, thin: true }, { ...base, y: smoothed(column.y, smoothing) });
      else lines.push({ ...base, y: column.y });
    }
  });
  return lines;
}

function latencyLines(spec, jobs, { over, smoothing }, range) {
  const points = latency.points.filter(point => point[spec.latency].count > 0), idle = mean(latency.idle[spec.latency]);
  const value = point => 1000 * mean(point[spec.latency]), lines = [], names = distinctNames(jobs);
  const smooth = y => smoothing > 0 ? smoothed(y, smoothing) : y;
  if (over === "time") {
    const inside = points.filter(point => point.time >= range[0] && point.time <= range[1]);
    const pick = training => ({ x: inside.map(p => p.time), y: inside.map(p => p.training === null || p.training === training ? value(p) : null), gaps: true });
    lines.push({ label: "while training", colour: "--c1", ...pick(true) }, { label: "without training", colour: "--c4", ...pick(false) });
  } else {
    jobs.forEach((job, i) => {
      const curve = curveOf(job.id), during = points.filter(p => p.training).map(p => [curve.stepAt(p.time - 1), value(p)]).filter(([step]) => step != null);
      lines.push({ label: jobs.length > 1 ? names[i] : "while training", colour: jobs.length > 1 ? `--c${i % 6}` : "--c1", x: during.map(p => p[0]), y: smooth(during.map(p => p[1])) });
    });
    if (idle != null && lines.some(line => line.x.length)) lines.push({ label: "mean without training", colour: "--c4", dash: DASH, thin: true, x: range, y: [1000 * idle, 1000 * idle] });
  }
  return lines;
}

function rangeOf(jobs, over) {
  const columns = jobs.flatMap(job => Object.values(curveOf(job.id).values)).map(column => column[over]).filter(x => x.length);
  if (!columns.length) return over === "time" ? [Date.now() / 1000 - 600, Date.now() / 1000] : [1, 2];
  let low = Math.min(...columns.map(x => x[0])), high = Math.max(...columns.map(x => x.at(-1)));
  if (over === "time") { const margin = Math.max(20, 0.15 * (high - low)); low -= margin; high += margin; }
  return low === high ? [low - 0.5, high + 0.5] : [low, high];
}

function note(spec, jobs) {
  if (spec.latency) {
    if (!latency.url) return "The trainer does not know the server's address: start it with service.server_url=http://127.0.0.1:8000 (apollo-tp serve does)";
    if (!latency.reachable) return `The server's metrics cannot be read: ${latency.reason}`;
    return jobs.length ? "No client has asked the server while this job was trained" : "No client has asked the server yet";
  }
  return jobs.length ? "No step yet" : "No job yet";
}

export function draw(force = false) {
  const jobs = shownJobs(), options = { over: $("over").value, smoothing: Number($("smoothing").value) };
  const version = JSON.stringify([jobs.map(job => [job.id, nameOf(job), curveOf(job.id).version]), latency.version, latency.reachable, latency.idle, options, $("log").checked]);
  if (!force && version === drawn) return;
  drawn = version;
  if (!jobs.some(job => curveOf(job.id).after)) options.over = "time"; // the server's latency has no steps then
  const range = rangeOf(jobs, options.over), time = options.over === "time";
  for (const spec of CHARTS) {
    const lines = spec.latency ? latencyLines(spec, jobs, options, range) : figureLines(spec, jobs, options);
    const some = lines.some(line => line.x.length && line.y.some(v => v != null));
    if (!charts.has(spec.id)) charts.set(spec.id, new Chart($(spec.big ? "charts" : "morecharts"), spec));
    const chart = charts.get(spec.id);
    show(chart.node, some || Boolean(spec.big));
    if (!chart.node.hidden) chart.draw(some ? lines : [], { time, log: $("log").checked, range, note: note(spec, jobs) });
  }
  show($("more"), CHARTS.some(spec => !spec.big && !charts.get(spec.id).node.hidden));
  text($("figuresnote"), jobs.length === 1 ? nameOf(jobs[0]) : jobs.length ? `${jobs.length} jobs` : "");
}

export function setUp() {
  zoom.changed = range => {
    zoom.range = range;
    $("zoomall").disabled = !range;
    draw(true);
  };
  for (const id of ["smoothing", "log"]) $(id).addEventListener("input", () => draw());
  $("over").addEventListener("input", () => zoom.changed(null));
  $("zoomin").addEventListener("click", () => zoomBy(0.5, charts.get("loss")));
  $("zoomout").addEventListener("click", () => zoomBy(2, charts.get("loss")));
  $("zoomall").addEventListener("click", () => zoom.changed(null));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(true));
}
