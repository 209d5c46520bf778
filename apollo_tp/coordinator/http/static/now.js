// The header, the tiles and the tab's title: what happens now.
import { $, command, duration, el, figure, milliseconds, number, show, text, textRows } from "./dom.js";
import { latency, mean } from "./series.js";
import { many, nameOf, state } from "./state.js";

const RECENT_SECONDS = 30;

export function drawNow() {
  const s = state.status, t = s.trainer, job = s.running;
  const replicas = t.replicas || [], several = t.num_replicas > 1;
  $("dot").classList.toggle("on", t.connected);
  const ranks = `${many(t.num_ranks || 0, "rank")}${several ? ` of ${replicas.length} of ${t.num_replicas} replicas` : ""}`;
  text($("trainer"), t.connected ? (job ? `training in place, ${ranks}` : `idle, ${ranks}`) : `no trainer: ${t.reason}`);
  drawModel(t);
  drawStart(t);
  drawReplicas(t, replicas, several);
  text($("progress"), job ? `${number(job.step)} / ${number(job.total_steps)}` : "idle");
  text($("left"), job ? `${nameOf(job)}${job.seconds_left == null ? "" : `, ${duration(job.seconds_left).replace(" ", "\u00a0")}\u00a0left`}` : waiting(s));
  $("bar").value = job ? job.step / Math.max(1, job.total_steps) : 0;
  show($("bar"), Boolean(job));
  const last = s.last_losses.at(-1);
  text($("loss"), last ? figure(last.loss) : "–");
  text($("lossnote"), !last ? "no step yet" : job ? "nats per token" : `nats per token, step ${last.step} of the last job`);
  text($("speed"), job?.tokens_per_second ? number(job.tokens_per_second) : "–");
  text($("padding"), `tokens per second${job && job.padding_share != null ? `, ${number(100 * job.padding_share)} % padding` : ""}`);
  text($("version"), number(t.weight_version));
  text($("saved"), s.unsaved ? "not saved yet: lost with the server" : s.last_checkpoint?.state === "succeeded" ? "saved" : "as the server loaded it");
  const share = job ? `${Math.floor(100 * job.step / Math.max(1, job.total_steps))} %` : t.connected ? "idle" : "no trainer";
  document.title = `${share} · ${job ? `${job.step}/${job.total_steps} · ` : ""}apollo_tp`;
}

function waiting(s) {
  const paused = s.queue.filter(job => job.state === "paused").length, queued = s.queue.length - paused;
  return [queued ? `${queued} waiting` : "", paused ? `${paused} paused` : ""].filter(Boolean).join(", ") || "no job runs";
}

function drawModel(t) {
  if (!t.model) return;
  const size = t.num_parameters >= 1e9 ? `${number(t.num_parameters / 1e9, 1)} B` : `${number(t.num_parameters / 1e6, 1)} M`;
  const name = t.served_model_names?.[0] || t.model.split("/").at(-1);
  text($("model"), `${name}, ${size} parameters, ${t.optimizer.split(",").slice(0, 2).join(",")}`);
  $("model").title = `${t.model}\n${t.optimizer}\ngradients: ${t.gradients}`;
}

/** How to start what is missing. */
function drawStart(t) {
  show($("start"), !t.connected && !t.model);
  if (t.connected || t.model || $("start").firstChild) return;
  $("start").className = "card";
  $("start").append(el("p", {}, "No trainer is connected yet. One command starts a server and its trainer:"), command("apollo-tp serve MODEL --tensor-parallel-size 2"),
    el("p", {}, "or, beside a server that runs with VLLM_PLUGINS=apollo:"), command("python -m apollo_tp.launch.torchrun --nproc-per-node 2"));
}

function drawReplicas(t, replicas, several) {
  show($("replicacard"), several);
  if (!several) return;
  text($("replicanote"), replicas.length < t.num_replicas ? `${t.num_replicas - replicas.length} away` : "");
  textRows($("replicas"), replicas, r => r.instance_id, r => [r.instance_id, r.host, number(r.weight_version), milliseconds(r.lag_seconds), r.health.replace("_", " ")], ["", "", "num", "num", ""]);
}

export function drawLatencyTile() {
  const key = "inter_token_seconds", last = latency.points.findLast(point => point[key].count > 0);
  const recent = last && state.status && state.status.time - last.time < RECENT_SECONDS ? mean(last[key]) : null;
  const idle = mean(latency.idle[key]), training = mean(latency.training[key]);
  text($("latency"), milliseconds(recent));
  text($("latencynote"), !latency.url ? "server's address not known" : !latency.reachable ? "server's metrics not reachable" :
    idle != null && training != null ? `mean ${milliseconds(training)} while training, ${milliseconds(idle)} without` :
      idle != null ? `mean ${milliseconds(idle)} without training` : training != null ? `mean ${milliseconds(training)} while training` : "no client has asked yet");
  $("latencynote").title = latency.reason || "";
}
