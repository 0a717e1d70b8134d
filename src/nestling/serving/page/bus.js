// News that one part of the page tells the others, without the parts knowing each other.
//
//   conversations          the list has changed
//   here {id}              another conversation is shown; id is null for a new one
//   reply {id, …}          a reply has ended (see replies.js)
//   busy                   a reply has begun or ended
//   models                 the models are known

const news = new EventTarget();

/** Tell everybody. */
export function emit(name, detail = {}) {
  news.dispatchEvent(new CustomEvent(name, { detail }));
}

/** Hear of something; the returned function ends it. */
export function on(name, act) {
  const hear = (event) => act(event.detail);
  news.addEventListener(name, hear);
  return () => news.removeEventListener(name, hear);
}
