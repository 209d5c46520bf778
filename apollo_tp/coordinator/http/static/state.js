// What the parts of the page share: the last status, the jobs by id, and which jobs are shown.
import { get } from "./api.js";

export const state = {
  status: null,
  jobs: new Map(),
  order: [],
  focus: null, // of the address: #job=ID
  compared: new Set(), // of the address: &with=ID,ID
  readOnly: false,
};

const fileNames = new Map();

/** What people call the job: its metadata's name, its suffix or its file, else what it does. */
export function nameOf(job) {
  if (!job) return "a job";
  const { spec } = job, metadata = spec.metadata || {};
  const given = metadata.name || metadata.run_name || spec.suffix || fileNames.get(spec.training_file);
  if (given) return given;
  if (metadata.learned_from) return `Feedback: ${many(job.num_samples, metadata.learned_from.split("/")[1]?.replace(/s$/, "") || "answer")}`;
  const kind = { supervised: "Fine-tuning", dpo: "DPO", reinforcement: "Reinforcement" }[spec.method] || spec.method;
  return `${sampledLoss(job) ? `${sampledLoss(job)} loss` : kind} on ${many(job.num_samples, "sample")}`;
}

/** The loss over sampled completions; "" for a job that has another. */
export const sampledLoss = ({ spec }) => spec.method !== "supervised" || (spec.loss?.name || "cross_entropy") === "cross_entropy" ? "" : spec.loss.name.replaceAll("_", " ");

export const many = (count, what) => `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;

/** The jobs in the charts: those that were chosen, else the running or the last one. */
export function shownJobs() {
  const first = state.focus || (state.compared.size ? null : state.status?.running?.id || state.order[0]);
  const chosen = [...new Set([first, ...state.compared])];
  return chosen.map(id => state.jobs.get(id)).filter(Boolean);
}

export async function loadJobs() {
  const page = await get("train/jobs?limit=50");
  state.order = page.data.map(job => job.id);
  for (const job of page.data) state.jobs.set(job.id, job);
  for (const id of [state.focus, ...state.compared])
    if (id && !state.order.includes(id)) state.jobs.set(id, await get(`train/jobs/${encodeURIComponent(id)}`));
  const unknown = page.data.some(job => job.spec.training_file && !fileNames.has(job.spec.training_file));
  if (!unknown) return;
  for (const file of (await get("v1/files")).data) fileNames.set(file.id, file.filename);
  for (const job of page.data) if (job.spec.training_file && !fileNames.has(job.spec.training_file)) fileNames.set(job.spec.training_file, "");
}

export function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  state.focus = asked.get("job");
  state.compared = new Set((asked.get("with") || "").split(",").filter(Boolean));
}

export function address(focus, compared = state.compared) {
  const others = [...compared].filter(id => id !== focus), asked = new URLSearchParams();
  if (focus) asked.set("job", focus);
  if (others.length) asked.set("with", others.join(","));
  return `#${asked}`.replaceAll("%2C", ",");
}
