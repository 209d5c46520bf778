// Figures of jobs, collected from their events, and the server's latency over time.
import { get } from "./api.js";

const PAGE = 10000, SHOWN_COMPLETIONS = 40, KEPT_EVENTS = 200, MAX_LATENCIES = 4096;
const OF_A_STEP = { // by the name in an event's data
  train_loss: "loss", valid_loss: "valid_loss", learning_rate: "learning_rate", grad_norm: "grad_norm",
  tokens_per_second: "tokens_per_second", train_mean_token_accuracy: "accuracy", valid_mean_token_accuracy: "valid_accuracy",
  mismatch_kl: "mismatch_kl", reward_mean: "reward", valid_reward_mean: "valid_reward", reward_margin: "reward_margin",
};

class Curve {
  constructor(id) { Object.assign(this, { id, after: 0, version: 0, values: {}, events: [], completions: [], ungraded: "" }); }

  /** Columns step, time (Unix seconds) and y of one figure. */
  of(name) { return this.values[name] ||= { step: [], time: [], y: [] }; }

  add(event) {
    const { data, type } = event;
    this.after = event.id;
    if (type === "metrics" || data.reward_mean !== undefined) {
      for (const [key, name] of Object.entries(OF_A_STEP)) {
        const value = data[key], column = this.of(name);
        if (value == null || !Number.isFinite(value) || (data.skipped && name !== "learning_rate")) continue;
        if (column.step.at(-1) >= data.step) continue; // rewards come with the samples and with the step
        column.step.push(data.step); column.time.push(event.time); column.y.push(value);
      }
    }
    if (data.samples && data.reward_mean !== undefined) {
      this.completions = [...data.samples.map((s, i) => ({ key: `${event.id}/${i}`, step: data.step, ...s })), ...this.completions].slice(0, SHOWN_COMPLETIONS);
      this.ungraded = data.ungraded ? `${data.ungraded} of ${data.completions} could not be graded: ${Object.keys(data.grader_errors)[0]}` : "";
    }
    if (type !== "metrics" || data.skipped) this.events = [event, ...this.events].slice(0, KEPT_EVENTS);
  }

  async load() {
    for (let more = true; more;) {
      const page = await get(`train/jobs/${encodeURIComponent(this.id)}/events?after=${this.after}&limit=${PAGE}`);
      for (const event of page.data) this.add(event);
      if (page.data.length) this.version++;
      more = page.has_more;
    }
  }

  /** The step (with a fraction) that was made at a time; null before the first and after the last one. */
  stepAt(time) {
    const { step, time: times } = this.of("loss");
    if (times.length < 2 || time < times[0] || time > times.at(-1)) return null;
    let low = 0, high = times.length - 1;
    while (high - low > 1) { const mid = (low + high) >> 1; if (times[mid] <= time) low = mid; else high = mid; }
    const share = (time - times[low]) / (times[high] - times[low] || 1);
    return step[low] + share * (step[high] - step[low]);
  }
}

const curves = new Map();

export function curveOf(id) {
  if (!curves.has(id)) curves.set(id, new Curve(id));
  return curves.get(id);
}

export const latency = { points: [], version: 0, reachable: false, reason: "", url: null, training: {}, idle: {} };

export async function loadLatency() {
  const last = latency.points.at(-1)?.time || 0;
  const answer = await get(`train/latency?after=${last}`);
  latency.points.push(...answer.data);
  if (latency.points.length > MAX_LATENCIES) latency.points = (await get("train/latency?after=0")).data; // coarser where it is old
  if (answer.data.length) latency.version++;
  Object.assign(latency, { reachable: answer.reachable, reason: answer.reason, url: answer.server_url, training: answer.with_training, idle: answer.without_training });
}

export const mean = total => total && total.count ? total.sum / total.count : null;

/** An exponential moving average without the bias of its start. */
export function smoothed(values, share) {
  let total = 0, weight = 0;
  return values.map(value => {
    total = share * total + (1 - share) * value;
    weight = share * weight + (1 - share);
    return total / weight;
  });
}
