// Everything that the page asks of the service goes through here: the key, the errors, the streams.

import { t } from "./i18n.js";
import { askForKey } from "./key.js";

const KEY = "nestling.key";
const KNOWN = new Set(["rate_limit_exceeded", "context_length_exceeded", "content_policy_violation", "no_store",
  "store_unavailable", "overloaded", "model_stopped", "forbidden_host", "no_model", "runs_forbidden"]);

/** An answer that is an error; status 0 where there was no answer at all. */
export class Failure extends Error {
  constructor(message, { status = 0, code = "unreachable" } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/**
 * Ask the service for JSON.
 *
 * options: method, body (an object), signal.
 * Throws Failure, or the AbortError of the signal. A missing or unknown key is asked for, then the request is repeated.
 */
export async function api(path, options = {}) {
  const response = await request(path, options);
  return response.status === 204 ? null : response.json();
}

/**
 * Read a stream of server-sent events; `take(event)` is called for each, in order.
 *
 * Throws Failure also where the stream breaks off or tells an error.
 */
export async function stream(path, { body, signal, take }) {
  const response = await request(path, { method: "POST", body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read().catch(broken);
    if (done) throw new Failure(t("error_cut_off"), { code: "cut_off" });
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const text = part.replace(/^data: /, "");
      if (text === "[DONE]") return;
      const event = JSON.parse(text);
      if (event.error) throw told(event.error, 500);
      take(event);
    }
  }
}

function broken(error) {
  throw error.name === "AbortError" ? error : new Failure(t("error_cut_off"), { code: "cut_off" });
}

async function request(path, options) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const response = await fetch(path, fetchOptions(options, key)).catch(unreachable);
    if (response.ok) return response;
    const failure = await failureOf(response);
    if (response.status !== 401) throw failure;
    // Another request may have been given the key meanwhile; then this one just tries it.
    if (sessionStorage.getItem(KEY) === key) await enterKey(failure);
  }
}

function fetchOptions({ method = "GET", body, signal }, key) {
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  return { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) };
}

function unreachable(error) {
  throw error.name === "AbortError" ? error : new Failure(t("error_unreachable"));
}

async function failureOf(response) {
  const body = await response.json().catch(() => ({}));
  return told(body.error ?? {}, response.status, response.headers.get("retry-after"));
}

/** An error of OpenAI's shape: in the person's language where people meet it, else as the service says it. */
function told(error, status, seconds = null) {
  const code = error.code ?? "";
  const message = KNOWN.has(code) ? t(`error_${code}`, { n: seconds ?? "…" }) : error.message;
  return new Failure(message || t("error_status", { status }), { status, code });
}

let asking = null;

/** Ask for the key once, however many requests want it. */
async function enterKey(failure) {
  asking ??= askForKey(failure.code === "invalid_api_key").finally(() => { asking = null; });
  const key = await asking;
  if (!key) throw new Failure(t("error_key"), { status: 401, code: failure.code });
  sessionStorage.setItem(KEY, key);
}
