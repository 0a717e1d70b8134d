// The HTML of stored replies, made by the service and kept by message.

import { api, Failure } from "./api.js";

const AT_ONCE = 100;
const known = new Map();

/** Remember the HTML that came with a reply. */
export function keepHtml(message, html) {
  if (html !== undefined) known.set(message.id, html);
}

/** Get the HTML of these messages, many in one request; where that fails, they are shown as plain text. */
export async function renderAll(messages) {
  const wanted = messages.filter((one) => one.role === "assistant" && !known.has(one.id));
  for (let start = 0; start < wanted.length; start += AT_ONCE) {
    await renderSome(wanted.slice(start, start + AT_ONCE));
  }
}

async function renderSome(messages) {
  try {
    const { data } = await api("/api/render", { method: "POST", body: { texts: messages.map((one) => one.content) } });
    messages.forEach((one, place) => known.set(one.id, data[place]));
  } catch (failure) {
    if (!(failure instanceof Failure)) throw failure;
  }
}

/** The HTML of a message, undefined where it could not be made. */
export function htmlOf(message) {
  return known.get(message.id);
}
