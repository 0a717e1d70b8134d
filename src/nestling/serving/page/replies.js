// Replies that are being written. They go on while the person looks at something else; the bus tells when one is done:
// reply {conversation, parent, message, html} or reply {conversation, parent, live, failure}.

import { api, stream } from "./api.js";
import { emit } from "./bus.js";
import { Live } from "./live.js";

const STORED = { tries: 20, wait: 150 }; // the service stores what was stopped once it sees that nobody listens
const running = new Map();

/** The reply that is being written in a conversation: {live, parent}, or undefined. */
export function runningIn(conversation) {
  return running.get(conversation);
}

/** Whether any reply is being written. */
export function isBusy() {
  return running.size > 0;
}

/** Begin a reply to the message `parent`; `known` are the ids of the replies that it has. */
export function beginReply(conversation, parent, body, known) {
  const reply = { live: new Live(), parent, known: new Set(known), abort: new AbortController() };
  running.set(conversation, reply);
  emit("busy");
  finish(conversation, reply, body);
  return reply;
}

/** Stop the reply of a conversation; what is written is kept. */
export function stopReply(conversation) {
  running.get(conversation)?.abort.abort();
}

async function finish(conversation, reply, body) {
  const ended = { conversation, parent: reply.parent, live: reply.live };
  try {
    Object.assign(ended, await written(conversation, reply, body));
  } catch (failure) {
    ended.failure = failure;
  }
  reply.live.end();
  running.delete(conversation);
  emit("reply", ended);
  emit("busy");
  emit("conversations");
}

async function written(conversation, reply, body) {
  let done = null;
  const take = (event) => {
    if (event.type === "done") done = event;
    else reply.live.take(event);
  };
  try {
    const path = `/api/conversations/${conversation}/reply`;
    await stream(path, { body: { ...body, parent: reply.parent }, signal: reply.abort.signal, take });
    return done;
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    return stored(conversation, reply);
  }
}

/** What was stored of a reply that was stopped; nothing where nothing was written yet. */
async function stored(conversation, reply) {
  for (let tries = 0; tries < STORED.tries; tries += 1) {
    const { messages } = await api(`/api/conversations/${conversation}`);
    const message = messages.find((one) => one.parent === reply.parent && !reply.known.has(one.id));
    if (message) return { message };
    if (!reply.live.body.querySelector(".prose, details")) break;
    await new Promise((resolve) => { setTimeout(resolve, STORED.wait); });
  }
  return { message: null };
}
