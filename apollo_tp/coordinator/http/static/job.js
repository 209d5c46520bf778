// One job, which the address names: what it is, its error, events, completions and samples.
import { get, sentence } from "./api.js";
import { $, duration, el, figure, keyed, moment, number, show, text, textRows } from "./dom.js";
import { curveOf } from "./series.js";
import { tokensOf } from "./samples.js";
import { address, many, nameOf, sampledLoss, state } from "./state.js";

let shown = null, sampleAt = -1;

function facts(job) {
  const { spec } = job, rate = job.tokens_per_second;
  return Object.entries({
    State: job.resumable ? "queued, will resume" : job.state.replace("_", " "),
    Method: sampledLoss(job) ? `${sampledLoss(job)} loss over sampled completions` : spec.method,
    Samples: number(job.num_samples) + (job.num_validation ? `, ${number(job.num_validation)} held out` : ""),
    "Epochs, batch size": `${spec.epochs}, ${spec.batch_size}`,
    "Learning rate": spec.learning_rate_scale === 1 ? "the trainer's" : `${figure(spec.learning_rate_scale)} times the trainer's`,
    "Trained tokens": `${number(job.tokens)}${rate ? `, ${number(rate)} per second` : ""}`,
    "Training time": duration(job.training_seconds) || "–",
    "Validation loss": job.valid_loss == null ? null : figure(job.valid_loss),
    "Mean reward, held out": job.valid_reward == null ? null : figure(job.valid_reward),
    Guard: job.guard ? `${job.guard.value == null ? "not finite" : figure(job.guard.value)}, before the job ${figure(job.guard.baseline)}${job.guard.verdict ? `: ${job.guard.verdict}` : ""}` : null,
    Created: moment(job.created_at),
    Finished: job.finished_at ? moment(job.finished_at) : null,
    Id: job.id,
  }).filter(([, value]) => value != null);
}

export function drawJob() {
  const job = state.jobs.get(state.focus);
  show($("job"), Boolean(job));
  if (!job) { shown = null; return; }
  if (shown !== job.id) {
    shown = job.id;
    sampleAt = -1;
    $("sample").replaceChildren();
    text($("sample-note"), "");
    text($("sample-after"), "Show the first");
    $("job-events").replaceChildren();
    $("completions").replaceChildren();
    $("job-trace").open = false;
  }
  text($("job-title"), nameOf(job));
  $("job-close").setAttribute("href", address(null));
  keyed($("job-facts"), facts(job), ([name]) => name, ([name]) => el("div", {}, el("dt", {}, name), el("dd")), (node, [, value]) => text(node.lastChild, value));
  show($("job-error"), Boolean(job.error));
  if (job.error) {
    text($("job-error-message"), job.error.message);
    $("job-error-message").className = "bad";
    show($("job-trace"), Boolean(job.error.traceback));
    text($("job-trace").lastElementChild, job.error.traceback || "");
    text($("job-rank"), job.error.rank == null ? "" : `of rank ${job.error.rank}`);
  }
  drawEvents(curveOf(job.id));
  const reinforced = job.spec.method === "reinforcement", over = ["succeeded", "failed", "cancelled"].includes(job.state);
  show($("job-samples"), !reinforced);
  $("sample-before").disabled = over || sampleAt <= 0;
  $("sample-after").disabled = over || sampleAt >= job.num_samples - 1;
  if (over && sampleAt < 0) text($("sample-note"), "Samples of a job that is over are removed.");
}

function drawEvents(curve) {
  const made = event => el("li", {}, el("time", {}, moment(event.time)), el("span", { class: event.level === "info" ? "" : event.level }));
  keyed($("job-events"), curve.events, event => event.id, made,
    (node, event) => text(node.lastChild, `${{ warn: "Warning: ", error: "Error: " }[event.level] || ""}${event.message}`));
  show($("job-completions"), curve.completions.length > 0);
  if (!curve.completions.length) return;
  const rewards = curve.of("reward");
  text($("rewardnote"), [rewards.y.length ? `mean of step ${rewards.step.at(-1)}: ${figure(rewards.y.at(-1), 3)}` : "", curve.ungraded].filter(Boolean).join("; "));
  textRows($("completions"), curve.completions, each => each.key, s => [s.step, s.reward == null ? "–" : figure(s.reward, 3), s.prompt, s.completion], ["num", "num", "text", "text"]);
}

async function turn(by) {
  const job = state.jobs.get(shown), at = Math.max(0, sampleAt + by);
  try {
    const page = await get(`train/jobs/${encodeURIComponent(job.id)}/samples?first=${at}`);
    if (page.reason || !page.data.length) { text($("sample-note"), `${page.reason || "there is no further sample"}.`.replace(/^./, c => c.toUpperCase())); return; }
    sampleAt = at;
    const learned = page.data.reduce((sum, s) => sum + s.weights.filter(w => w > 0).length, 0), all = page.data.reduce((sum, s) => sum + s.token_ids.length, 0);
    text($("sample-note"), `Sample ${at + 1} of ${number(job.num_samples)}: ${many(all, "token")}, ${number(learned)} of them learned`);
    text($("sample-after"), "Next");
    $("sample").replaceChildren(...page.data.map(tokensOf));
    drawJob();
  } catch (error) { text($("sample-note"), sentence(error)); }
}

export function setUp() {
  $("sample-before").addEventListener("click", () => turn(-1));
  $("sample-after").addEventListener("click", () => turn(1));
}
