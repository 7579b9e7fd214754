"use strict";
// The canary's page. Everything from the gateway is text, put in by textContent alone.
(() => {
  const POLL_MS = 2000, MOST_MS = 30000, ANSWER_MS = 20000, STALE_S = 15, TOLD_POINTS = 60;
  const COMMANDS = {
    start: { label: "Start", when: ["pending", "rolled_back", "aborted", "completed"] },
    approve: { label: "Approve next step", when: ["awaiting"] },
    hold: { label: "Hold", when: ["running", "awaiting"] },
    resume: { label: "Resume", when: ["held"] },
    rollback: { label: "Roll back", when: ["running", "awaiting", "held", "completed"] },
  };
  const embedded = document.getElementById("document");
  const $ = (id) => document.getElementById(id);
  const parts = new Map(), opened = new Set(), choose = document.createElement("select");
  let token = null, wait = POLL_MS, doc = null, seenMs = 0, timer = 0, asked = 0, shown = 0;

  // --- small helpers ---------------------------------------------------------------------------

  const make = (tag, text, attributes) => {
    const e = document.createElement(tag);
    if (text !== undefined && text !== null) e.textContent = String(text);
    for (const [k, v] of Object.entries(attributes || {})) e.setAttribute(k, v);
    return e;
  };
  const number = (v) => (v === null || v === undefined ? "unbounded" : Number(v.toPrecision(4)).toString());
  const figure = (f) => {
    if (!f) return "none";
    if (f.estimate === null && !f.count) return "no request";
    return `${number(f.estimate)} (${number(f.low)} to ${number(f.high)}; ${f.count})`;
  };
  const when = (s) => new Date(s * 1000).toISOString().replace("T", " ").slice(0, 19) + " UTC";
  const table = (head, rows, label) => {
    const box = make("div", null, { class: "scroll", tabindex: "0", role: "region", "aria-label": label });
    const t = make("table"), h = make("tr"), b = make("tbody");
    head.forEach((c) => h.append(make("th", c, { scope: "col" })));
    const thead = make("thead"); thead.append(h);
    rows.forEach((row) => {
      const r = make("tr");
      row.forEach((c) => r.append(c instanceof Node ? c : make("td", c)));
      b.append(r);
    });
    t.append(thead, b); box.append(t);
    return box;
  };
  const folded = (label, rows) => {
    const box = make("details");
    box.open = opened.has(label);
    box.addEventListener("toggle", () => (box.open ? opened.add(label) : opened.delete(label)));
    box.append(make("summary", label), table(rows[0], rows.slice(1), label));
    return box;
  };
  const range = (t) => (t ? `${number(t[0])} (${number(t[1])} to ${number(t[2])})` : "none");
  const answer = (a) => make("td", { ok: "within", worse: "WORSE", open: "open" }[a] || a, { class: a });

  // --- what is shown ---------------------------------------------------------------------------

  function ladder(d) {
    const list = make("ol", null, { class: "ladder", "aria-label": "Steps" });
    const active = d.progress.weight > 0;
    d.plan.steps.forEach((step, i) => {
      const here = active && i === d.progress.step && d.progress.phase !== "completed";
      const done = active && (i < d.progress.step || d.progress.phase === "completed");
      const item = make("li", `${step} %`, { class: here ? "here" : done ? "done" : "" });
      if (here) {
        item.setAttribute("aria-current", "step");
        const bake = make("progress", null, { max: d.plan.bake_s || 1, value: Math.min(d.progress.baked_s, d.plan.bake_s || 1), "aria-label": "time watched at this step" });
        item.append(" ", bake, ` ${Math.round(d.progress.baked_s)} of ${Math.round(d.plan.bake_s)} s`);
      }
      list.append(item);
    });
    return list;
  }
  function waits(d) {
    const box = make("div");
    if (d.trouble) box.append(make("p", `The rollout's memory cannot be used: ${d.trouble}`, { class: "trouble" }));
    if (d.progress.why) box.append(make("p", `Held: ${d.progress.why}`));
    if (d.plan.frozen) box.append(make("p", `Frozen: ${d.plan.frozen}`));
    if (!d.leads && d.progress.weight > 0) box.append(make("p", "Another gateway decides; it knows what the next step waits for.", { class: "note" }));
    const list = make("ul");
    d.lacks.forEach((l) => list.append(make("li", l)));
    if (d.lacks.length) box.append(make("p", "The next step waits:"), list);
    return box;
  }
  function arms(d) {
    const rows = Object.entries(d.arms).map(([name, a]) => [
      name, a.model, a.requests, a.in_flight,
      `${a.split.happened} of ${a.split.routed}` + (a.split.unobserved ? `, ${a.split.unobserved} unobserved` : "")
        + (a.split.ended_by_prefill ? `, ${a.split.ended_by_prefill} ended by prefill` : ""),
      a.workers.map((w) => `${w.name} (${w.role}): ${w.healthy ? "healthy" : w.reason}`).join("; "),
    ]);
    return table(["Arm", "Model", "Requests", "In flight", "Really split, of the last", "Workers"], rows, "Arms");
  }
  function guardrails(d) {
    const rows = d.guardrails.map((g) => [
      g.name + (g.required ? "" : " (only rolls back)"), answer(g.answer), figure(g.baseline),
      figure(g.candidate), g.allowed === null ? "" : `${number(g.allowed)} ${g.unit}`, g.reason,
    ]);
    return table(["Guardrail", "Verdict", "Baseline (interval; requests)", "Candidate", "Allowed", "Why"], rows, "Guardrails");
  }
  function parity(d) {
    if (!d.parity) return make("p", "Answers are not compared (canary.shadow).");
    const rows = d.parity.findings.map((f) => [f.bucket, f.aspect, answer(f.answer), figure(f.baseline), figure(f.candidate), f.allowed, f.reason]);
    const box = make("div");
    box.append(make("p", `Pairs: ${d.parity.pairs.candidate} with the candidate, ${d.parity.pairs.baseline} of the baseline with itself. ` +
      `Copies never answered: ${d.parity.lost.candidate} of the candidate, ${d.parity.lost.baseline} of the baseline.`),
      table(["Prompts", "Aspect", "Verdict", "Baseline with itself", "Candidate", "Allowed", "Why"], rows, "Parity"));
    return box;
  }
  function shadow(d) {
    if (!d.shadow) return make("p", "No copies are sent.");
    const s = d.shadow;
    const skipped = Object.entries(s.skipped).map(([k, v]) => `${k}: ${v}`).join(", ");
    return make("p", `${s.pairs} pairs; copies to the candidate ${s.copied.candidate || 0}, to the baseline ${s.copied.baseline || 0}; ` +
      `TTFT of the candidate's copy over its original's, median ${s.ttft_ratio_p50 === null ? "unknown" : number(s.ttft_ratio_p50)}, ` +
      `end to end ${s.e2e_ratio_p50 === null ? "unknown" : number(s.e2e_ratio_p50)}. Not copied: ${skipped || "none"}.`);
  }
  function log(d) {
    const rows = d.decisions.map((x) => [when(x.at_s), x.kind, x.by, `${x.from_weight} % to ${x.to_weight} %`, x.why.join("; ")]);
    return table(["When", "What", "By", "Traffic", "Why"], rows, "Decisions");
  }

  // --- charts ----------------------------------------------------------------------------------

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axis = (label, more) => ({ label, stroke: "GrayText", grid: { stroke: "#8883" }, ticks: { stroke: "#8883" }, ...more });
  const width = (box) => Math.max(260, Math.min(1100, box.clientWidth || 320));

  function draw(part, label, options, data) {
    const canvas = make("div", null, { class: "chart", role: "img", "aria-label": `${label}; a table with the figures follows` });
    part.body.append(canvas);
    try {
      part.charts.push(new uPlot({ width: width(part.body), ...options }, data, canvas));
    } catch (e) {  // uPlot asks for a locale that the browser knows: some headless ones have none
      canvas.replaceWith(make("p", `The chart cannot be drawn here (${e.message}); the table tells the same.`));
    }
  }
  function overTime(part, d) {
    const names = [...new Set(d.history.flatMap((p) => Object.keys(p.figures)))];
    choose.parentElement.hidden = !names.length;
    if (!names.length) { part.body.append(make("p", "No step has been watched yet.")); return; }
    const chosen = names.includes(choose.value) ? choose.value : names[0];
    if ([...choose.options].map((o) => o.value).join("\n") !== names.join("\n")) {
      choose.replaceChildren(...names.map((n) => make("option", n, { value: n })));
      choose.value = chosen;
    }
    const points = d.history.filter((p) => p.figures[chosen]);
    const x = points.map((p) => p.at_s), get = (arm, i) => points.map((p) => { const f = p.figures[chosen][arm]; return f ? f[i] : null; });
    const data = [x, ...["baseline", "candidate"].flatMap((a) => [get(a, 0), get(a, 1), get(a, 2)]), points.map((p) => p.figures[chosen].allowed)];
    const line = (label, color, more) => ({ label, stroke: color, width: 2, spanGaps: true, ...more });
    const base = css("--base"), cand = css("--cand"), thin = { width: 1, dash: [3, 3], points: { show: false } };
    if (points.length < 2) { part.body.append(make("p", "Lines begin with the second point, half a minute after the first.")); return; }
    draw(part, `${chosen} over time`, {
      height: 240, scales: { x: { time: true } },
      axes: [axis(""), axis(chosen)],
      bands: [{ series: [3, 2], fill: base + "22" }, { series: [6, 5], fill: cand + "22" }],
      series: [{}, line("baseline", base), line("low", base, thin), line("high", base, thin), line("candidate", cand), line("low", cand, thin), line("high", cand, thin), line("allowed", css("--bad"), { dash: [8, 4], width: 1 })],
    }, data);
    const rows = points.slice(-TOLD_POINTS).reverse().map((p) => {
      const f = p.figures[chosen];
      return [when(p.at_s), `${p.weight} %`, range(f.baseline), range(f.candidate), f.allowed === null ? "" : number(f.allowed)];
    });
    part.body.append(folded(`Figures of ${chosen} over time`, [["When", "Traffic", "Baseline (interval)", "Candidate (interval)", "Allowed"], ...rows]));
  }
  function distributions(part, d) {
    const found = Object.entries(d.distributions).filter(([, v]) => v.edges.length > 1);
    if (!found.length) part.body.append(make("p", "No request was counted at this step yet."));
    found.forEach(([name, v]) => {
      const middle = v.edges.slice(1).map((e, i) => Math.sqrt(Math.max(v.edges[i], e / 10) * e));
      const share = (counts) => { const n = counts.reduce((a, b) => a + b, 0); return counts.map((c) => (n ? (100 * c) / n : 0)); };
      part.body.append(make("h3", `${name} (${v.unit})`));
      draw(part, `distribution of ${name} in both arms`, {
        height: 200, scales: { x: { time: false, distr: 3 } },
        axes: [axis(v.unit), axis("% of requests")],
        series: [{ label: v.unit }, { label: "baseline", stroke: css("--base"), width: 2, paths: window.uPlot && uPlot.paths.stepped({ align: 0 }) }, { label: "candidate", stroke: css("--cand"), width: 2, paths: window.uPlot && uPlot.paths.stepped({ align: 0 }) }],
      }, [middle, share(v.baseline), share(v.candidate)]);
      const rows = v.baseline.map((count, i) => [`${number(v.edges[i])} to ${number(v.edges[i + 1])}`, count, v.candidate[i]]);
      part.body.append(folded(`Figures of the distribution of ${name}`, [[name + (v.unit ? ` (${v.unit})` : ""), "Baseline, requests", "Candidate, requests"], ...rows]));
    });
  }

  // --- putting it together ---------------------------------------------------------------------

  // Of each part: its title, what it depends on, and what fills it. Parts stay in the page and only
  // their bodies are drawn anew, and only when that changed: readers keep their place.
  const PARTS = [
    ["Steps", (d) => [d.plan, d.progress, d.lacks, d.trouble, d.leads], (part, d) => part.body.append(ladder(d), waits(d))],
    ["Arms", (d) => d.arms, (part, d) => part.body.append(arms(d))],
    ["Guardrails", (d) => [d.guardrails, d.counted], (part, d) => part.body.append(
      make("p", `Counted: ${d.counted.baseline} of the baseline, ${d.counted.candidate} of the candidate. Intervals hold at every look.`, { class: "note" }), guardrails(d))],
    ["Evidence over time", (d) => [d.history, choose.value], overTime],
    ["Distributions", (d) => d.distributions, distributions],
    ["Do both say the same?", (d) => d.parity, (part, d) => part.body.append(parity(d))],
    ["Copies", (d) => d.shadow, (part, d) => part.body.append(shadow(d))],
    ["Decisions", (d) => d.decisions, (part, d) => part.body.append(log(d))],
  ];

  function build() {
    $("main").replaceChildren();  // a report has its tables for readers without JavaScript there
    for (const [title] of PARTS) {
      const s = make("section"), body = make("div");
      s.append(make("h2", title));
      if (title === "Evidence over time") {
        const label = make("label", "Guardrail ");
        choose.id = "metric";
        choose.addEventListener("change", () => show(doc));
        label.append(choose); s.append(label);
      }
      s.append(body); $("main").append(s);
      parts.set(title, { body, charts: [], drawn: null });
    }
  }
  function place(body) {
    const found = [...body.querySelectorAll(".scroll, summary")], name = (e) => e.getAttribute("aria-label") || e.textContent;
    return new Map(found.map((e) => [e.tagName + name(e), e]));
  }
  function fill(part, key, render, d) {
    const before = place(part.body);
    part.charts.forEach((c) => c.destroy()); part.charts = [];
    const held = [...before].map(([name, e]) => [name, e.scrollLeft, e === document.activeElement]);
    const tall = part.body.offsetHeight;
    part.body.style.minHeight = `${tall}px`;  // the page must not jump while it is empty
    part.body.replaceChildren();
    render(part, d);
    part.body.style.minHeight = "";
    const after = place(part.body);
    for (const [name, left, focused] of held) {
      const e = after.get(name);
      if (!e) continue;
      e.scrollLeft = left;
      if (focused) e.focus({ preventScroll: true });
    }
    part.drawn = key();
  }
  function show(d) {
    if (!parts.size) build();
    $("title").textContent = `Canary ${d.canary}: ${d.candidate}`;
    const here = d.weight_here === d.progress.weight ? "" : `; this gateway gives it ${d.weight_here} %`;
    const state = `${d.progress.phase.replace("_", " ")}, ${d.progress.weight} % to the candidate${here}`;
    if ($("state").textContent !== state) $("state").textContent = state;
    buttons(d);
    for (const [title, depends, render] of PARTS) {
      const part = parts.get(title), key = () => JSON.stringify(depends(d));
      if (part.drawn !== key()) fill(part, key, render, d);
    }
  }
  function again() {
    parts.forEach((part) => { if (part.charts.length) part.drawn = null; });
    if (doc) show(doc);
  }
  function buttons(d) {
    const box = $("buttons");
    if (embedded) return;
    $("rights").hidden = d.may_act;
    $("rights").textContent = "Commands need a link that may act: `disagg canary page POLICY` prints one.";
    for (const [name, c] of Object.entries(COMMANDS)) {
      let b = $("do-" + name);
      if (!b) {
        b = make("button", c.label, { type: "button", id: "do-" + name });
        b.addEventListener("click", () => ask(name));
        box.append(b);
      }
      b.disabled = !d.may_act || !c.when.includes(d.progress.phase);
    }
  }
  function ask(name) {
    $("dialog-title").textContent = `${COMMANDS[name].label}?`;
    $("dialog-error").textContent = "";
    $("why").value = "";
    $("dialog").dataset.name = name;
    $("dialog").showModal();
    $("why").focus();
  }
  async function send(event) {
    event.preventDefault();
    const body = JSON.stringify({ do: $("dialog").dataset.name, why: $("why").value, by: $("by").value });
    $("confirm").disabled = true;
    try {
      const [status, found] = await call("POST", body);
      if (status === 200) { fresh(found, ++asked); $("dialog").close(); }
      else $("dialog-error").textContent = found.error ? found.error.message : `the gateway answered ${status}`;
    } catch (e) {
      $("dialog-error").textContent = `no answer: ${e.message}`;
    } finally {
      $("confirm").disabled = false;
    }
  }

  // --- the gateway -----------------------------------------------------------------------------

  async function call(method, body) {
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    const a = await fetch("/internal/canary", { method, body, headers, cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS) });
    const text = await a.text();
    try { return [a.status, JSON.parse(text)]; } catch (e) { if (a.ok) throw e; return [a.status, {}]; }
  }
  // An answer to what was asked before a newer one was answered is old: it is not shown.
  function fresh(found, number) {
    if (number < shown) return;
    shown = number;
    doc = found; seenMs = performance.now(); wait = POLL_MS;
    try { show(doc); stale(""); } catch (e) { console.error(e); stale(`This page failed: ${e.message}`); }
  }
  function stale(why) {
    $("stale").hidden = !why;
    if ($("stale").textContent !== why) $("stale").textContent = why;
  }
  const old = () => (doc ? `; what stands here is of ${when(doc.now_s)} and may be old.` : ".");
  async function poll() {
    const number = ++asked;
    timer = 0;
    try {
      const [status, found] = await call("GET");
      if (status === 200) fresh(found, number);
      else {
        wait = Math.min(MOST_MS, wait * 2);
        stale(status === 401 || status === 403 ? "This link may not see the canary, or has ended: `disagg canary page POLICY` prints a new one." : `The gateway answered ${status}${old()}`);
      }
    } catch (e) {
      wait = Math.min(MOST_MS, wait * 2);
      stale(`The gateway does not answer (${e.message})${old()}`);
    }
    timer = setTimeout(poll, wait);
  }
  function takeToken() {
    const given = new URLSearchParams(location.hash.slice(1)).get("token");
    if (!given) return false;
    token = given;
    try { sessionStorage.setItem("disagg-canary", given); } catch (e) { /* private windows */ }
    history.replaceState(null, "", location.pathname);
    return true;
  }
  function begin() {
    let resized = 0, wide = window.innerWidth;
    window.addEventListener("resize", () => {
      if (window.innerWidth === wide) return;  // a phone's bars come and go while it scrolls
      wide = window.innerWidth; clearTimeout(resized); resized = setTimeout(again, 200);
    });
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
    if (embedded) { doc = JSON.parse(embedded.textContent); show(doc); return; }
    if (!takeToken()) try { token = sessionStorage.getItem("disagg-canary"); } catch (e) { /* private windows */ }
    // a new link in the same tab loads nothing anew
    window.addEventListener("hashchange", () => {
      if (!takeToken() || !timer) return;
      clearTimeout(timer); timer = 0; wait = POLL_MS; poll();
    });
    setInterval(() => {
      if (doc && $("stale").hidden && performance.now() - seenMs > 1000 * STALE_S) stale(`The gateway is slow to answer${old()}`);
    }, 1000);
    $("form").addEventListener("submit", send);
    $("cancel").addEventListener("click", () => $("dialog").close());
    poll();
  }
  begin();
})();
