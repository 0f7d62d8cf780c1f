"use strict";
// The page's switch of colours, its reading again while a run goes on, and its browser of examples. Text goes into the page as textContent
// alone; one example is in the page at a time.
(() => {
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;

  let kept = {}; // over a reading again; a browser may refuse to keep anything
  try {
    kept = sessionStorage;
  } catch {}
  if (kept.theme) root.dataset.theme = kept.theme;
  byId("theme").addEventListener("click", () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = root.dataset.theme || (dark ? "dark" : "light");
    kept.theme = root.dataset.theme = now === "dark" ? "light" : "dark";
  });

  if (root.dataset.every) {
    setInterval(() => {
      if (!document.activeElement.closest("#examples, details")) location.reload();
    }, 1000 * root.dataset.every);
  }

  const form = byId("filter");
  if (!form) return;
  const runs = JSON.parse(byId("runs").textContent);
  const examples = JSON.parse(byId("data").textContent);
  const field = (name) => form.elements[name];
  const place = byId("place");
  let found = examples, at = 0;

  // Characters that nobody sees, or that turn the order of others: the same as in markup.py.
  const steering =
    /[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]/gu;

  function element(name, kind, text) {
    const made = document.createElement(name);
    if (kind) made.className = kind;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function written(text) {
    const made = element("div", "text");
    made.dir = "auto";
    let last = 0;
    for (const match of text.matchAll(steering)) {
      made.append(text.slice(last, match.index));
      const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      made.append(element("span", "code", `U+${code}`));
      last = match.index + match[0].length;
    }
    made.append(text.slice(last) || (last ? "" : "\u00a0"));
    return made;
  }

  const number = (value) => (value === null ? "no score" : `score ${value}`);

  function judgement(said) {
    const made = element("details", "judgement");
    const reason = said.r ? ` (${said.r})` : "";
    const title = element("summary", "", `${number(said.x)}${reason}: ${said.b}`);
    if (said.l) title.append(" ", element("span", "label", said.l.toUpperCase()));
    made.append(title);
    made.append(said.t === null ? element("p", "note", "no words") : written(said.t));
    made.open = byId("words").checked && said.t !== null;
    return made;
  }

  function answer(one) {
    const made = element("section", `answer ${one.l || ""}`);
    const name = /^\d+$/.test(one.n) ? `Candidate ${one.n}` : one.n;
    const title = element("h4", "", `${name}, ${one.w || number(one.x)} `);
    if (one.l) title.append(element("span", "label", one.l.toUpperCase()));
    const advantage = one.a ? `advantage ${one.a}` : "";
    const tokens = one.k === undefined ? "" : `${one.k} tokens`;
    const notes = [advantage, tokens, one.e || ""].filter(Boolean);
    made.append(title, written(one.t));
    if (notes.length) made.append(element("p", "note", notes.join(", ")));
    made.append(...one.j.map(judgement));
    return made;
  }

  function show() {
    const box = byId("example");
    at = Math.max(0, Math.min(at, found.length - 1));
    byId("count").textContent = `of ${found.length.toLocaleString("en")}`;
    byId("previous").disabled = at <= 0;
    byId("next").disabled = at >= found.length - 1;
    place.max = Math.max(1, found.length);
    if (document.activeElement !== place) place.value = found.length ? at + 1 : 0;
    box.replaceChildren();
    if (!found.length) {
      box.append(element("p", "", "No example is like that."));
      return;
    }
    const one = found[at];
    const title = element("h3", "", `Prompt ${one.id}${runs.length > 1 ? ` of ${runs[one.r]}` : ""}`);
    const margin = one.m === null ? "" : `Margin of the pair: ${one.m}`;
    const answers = element("div", "answers");
    const rank = (c) => (c.l === "chosen" ? 0 : c.l === "rejected" ? 1 : 2);
    answers.append(...one.c.toSorted((a, b) => rank(a) - rank(b)).map(answer));
    box.append(title, written(one.p), element("p", "note", margin || pairless(one)), answers);
  }

  function pairless(one) {
    const used = one.c.some((c) => c.l || c.j.some((j) => j.l));
    return used ? "" : "Nothing of this prompt was trained on.";
  }

  const best = (one) =>
    one.c.reduce((most, c) => (c.x === null || (most !== null && most >= c.x) ? most : c.x), null);
  const words = new Map();
  function textOf(one) {
    if (!words.has(one)) {
      const all = [one.id, one.p, ...one.c.flatMap((c) => [c.t, ...c.j.map((j) => j.t || "")])];
      words.set(one, all.join("\n").toLowerCase());
    }
    return words.get(one);
  }

  function within(value, low, high) {
    if (low === "" && high === "") return true;
    return value !== null && (low === "" || value >= +low) && (high === "" || value <= +high);
  }

  const kinds = {
    "": () => true,
    pair: (one) => one.c.some((c) => c.l === "chosen" || c.a),
    none: (one) => !kinds.pair(one),
    unread: (one) => one.c.some((c) => c.j.some((j) => j.x === null)),
  };
  const values = { m: (one) => one.m, x: best };

  function choose() {
    const given = Object.fromEntries(new FormData(form));
    const text = given.text.toLowerCase();
    found = examples.filter(
      (one) =>
        (given.run === "" || one.r === +given.run) &&
        (given.stage === "" || one.s === given.stage) &&
        kinds[given.kind](one) &&
        within(best(one), given.low, given.high) &&
        within(one.m, given.least, given.most) &&
        (text === "" || textOf(one).includes(text)),
    );
    if (given.order) {
      const sign = given.order[0] === "-" ? -1 : 1;
      const value = values[given.order.slice(-1)];
      const keyed = found.map((one) => [value(one), one]);
      keyed.sort(([a], [b]) => (a === null) - (b === null) || sign * (a - b));
      found = keyed.map(([, one]) => one);
    }
    at = 0;
    show();
  }

  function fill(select, options) {
    select.append(new Option("all", ""), ...options.map(([text, value]) => new Option(text, value)));
  }

  fill(field("run"), runs.map((name, i) => [name, i]));
  fill(field("stage"), [...new Set(examples.map((one) => one.s))].map((name) => [name, name]));
  byId("of-run").hidden = runs.length < 2;
  let wait;
  form.addEventListener("input", () => {
    clearTimeout(wait);
    wait = setTimeout(choose, 120);
  });
  form.addEventListener("reset", () => setTimeout(choose));
  form.addEventListener("submit", (event) => event.preventDefault());
  const turn = (by) => {
    at += by;
    show();
  };
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  byId("words").addEventListener("change", show);
  place.addEventListener("input", () => {
    at = (parseInt(place.value, 10) || 1) - 1;
    show();
  });
  byId("viewer").addEventListener("keydown", (event) => {
    if (event.target.matches("input") || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "ArrowRight") turn(1);
    else if (event.key === "ArrowLeft") turn(-1);
    else return;
    event.preventDefault();
  });
  at = found.findIndex(kinds.pair);
  show();
})();
