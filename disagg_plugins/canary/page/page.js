"use strict";
// The canary's page. Everything from the gateway is text, put in by textContent alone.
(() => {
  const POLL_MS = 2000, MOST_MS = 30000, ANSWER_MS = 20000, STALE_S = 15;
  const COMMANDS = {
    start: { label: "Start", when: ["pending", "rolled_back", "aborted", "completed"] },
    approve: { label: "Approve next step", when: ["awaiting"] },
    hold: { label: "Hold", when: ["running", "awaiting"] },
    resume: { label: "Resume", when: ["held"] },
    rollback: { label: "Roll back", when: ["running", "awaiting", "held", "completed"] },
  };
  const embedded = document.getElementById("document");
  const $ = (id) => document.getElementById(id);
  let token = null, wait = POLL_MS, doc = null, seenMs = 0, charts = [], drawn = "", chosen = null;

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
  const section = (title, ...parts) => {
    const s = make("section"); s.append(make("h2", title), ...parts); return s;
  };
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
    const list = make("ul");
    d.lacks.forEach((l) => list.append(make("li", l)));
    if (d.lacks.length) box.append(make("p", "The next step waits:"), list);
    return box;
  }
  function arms(d) {
    const rows = Object.entries(d.arms).map(([name, a]) => [
      name, a.model, a.requests, a.in_flight,
      `${a.split.happened} of ${a.split.routed}`,
      a.workers.map((w) => `${w.name} (${w.role}): ${w.healthy ? "healthy" : w.reason}`).join("; "),
    ]);
    return table(["Arm", "Model", "Requests", "In flight", "Really split, of the last", "Workers"], rows, "Arms");
  }
  function guardrails(d) {
    const rows = d.guardrails.map((g) => [
      g.name + (g.required ? "" : " (only rolls back)"), answer(g.answer), figure(g.baseline),
      figure(g.candidate), g.allowed === null ? "" : `${number(g.allowed)} ${g.unit}`,
    ]);
    return table(["Guardrail", "Verdict", "Baseline (interval; requests)", "Candidate", "Allowed"], rows, "Guardrails");
  }
  function parity(d) {
    if (!d.parity) return make("p", "Answers are not compared (canary.shadow).");
    const rows = d.parity.findings.map((f) => [f.bucket, f.aspect, answer(f.answer), figure(f.baseline), figure(f.candidate), f.allowed]);
    const box = make("div");
    box.append(make("p", `Pairs: ${d.parity.pairs.candidate} with the candidate, ${d.parity.pairs.baseline} of the baseline with itself.`),
      table(["Prompts", "Aspect", "Verdict", "Baseline with itself", "Candidate", "Allowed"], rows, "Parity"));
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

  function overTime(box, d) {
    const names = [...new Set(d.history.flatMap((p) => Object.keys(p.figures)))];
    if (!names.length) { box.append(make("p", "No step has been watched yet.")); return; }
    if (!names.includes(chosen)) chosen = names[0];
    const label = make("label", "Guardrail "), choose = make("select", null, { id: "metric" });
    names.forEach((n) => { const o = make("option", n, { value: n }); if (n === chosen) o.selected = true; choose.append(o); });
    choose.addEventListener("change", () => { chosen = choose.value; drawn = ""; show(doc); $("metric").focus(); });
    label.append(choose); box.append(label);
    const points = d.history.filter((p) => p.figures[chosen]);
    const x = points.map((p) => p.at_s), get = (arm, i) => points.map((p) => { const f = p.figures[chosen][arm]; return f ? f[i] : null; });
    const data = [x, ...["baseline", "candidate"].flatMap((a) => [get(a, 0), get(a, 1), get(a, 2)]), points.map((p) => p.figures[chosen].allowed)];
    const line = (label, color, more) => ({ label, stroke: color, width: 2, spanGaps: true, ...more });
    const base = css("--base"), cand = css("--cand"), thin = { width: 1, dash: [3, 3], points: { show: false } };
    if (points.length < 2) { box.append(make("p", "Lines begin with the second point, half a minute after the first.")); return; }
    const canvas = make("div", null, { class: "chart", role: "img", "aria-label": `${chosen} over time; the table of guardrails tells the last values` });
    box.append(canvas);
    charts.push(new uPlot({
      width: width(box), height: 240, scales: { x: { time: true } },
      axes: [axis(""), axis(chosen)],
      bands: [{ series: [3, 2], fill: base + "22" }, { series: [6, 5], fill: cand + "22" }],
      series: [{}, line("baseline", base), line("low", base, thin), line("high", base, thin), line("candidate", cand), line("low", cand, thin), line("high", cand, thin), line("allowed", css("--bad"), { dash: [8, 4], width: 1 })],
    }, data, canvas));
  }
  function distributions(box, d) {
    const found = Object.entries(d.distributions).filter(([, v]) => v.edges.length > 1);
    if (!found.length) box.append(make("p", "No request was counted at this step yet."));
    found.forEach(([name, v]) => {
      const middle = v.edges.slice(1).map((e, i) => Math.sqrt(Math.max(v.edges[i], e / 10) * e));
      const share = (counts) => { const n = counts.reduce((a, b) => a + b, 0); return counts.map((c) => (n ? (100 * c) / n : 0)); };
      const canvas = make("div", null, { class: "chart", role: "img", "aria-label": `distribution of ${name} in both arms` });
      box.append(make("h3", `${name} (${v.unit})`), canvas);
      charts.push(new uPlot({
        width: width(box), height: 200, scales: { x: { time: false, distr: 3 } },
        axes: [axis(v.unit), axis("% of requests")],
        series: [{ label: v.unit }, { label: "baseline", stroke: css("--base"), width: 2, paths: uPlot.paths.stepped({ align: 0 }) }, { label: "candidate", stroke: css("--cand"), width: 2, paths: uPlot.paths.stepped({ align: 0 }) }],
      }, [middle, share(v.baseline), share(v.candidate)], canvas));
    });
  }

  // --- putting it together ---------------------------------------------------------------------

  function show(d) {
    const key = JSON.stringify({ ...d, now_s: 0 }) + chosen;
    $("title").textContent = `Canary ${d.canary}: ${d.candidate}`;
    const state = `${d.progress.phase.replace("_", " ")}, ${d.progress.weight} % to the candidate`;
    if ($("state").textContent !== state) $("state").textContent = state;
    buttons(d);
    if (key === drawn) return;
    drawn = key;
    const focus = document.activeElement && document.activeElement.id;
    const main = $("main"), x = window.scrollX, y = window.scrollY;
    charts.forEach((c) => c.destroy()); charts = [];
    const time = make("div"), spread = make("div");
    main.replaceChildren(
      section("Steps", ladder(d), waits(d)), section("Arms", arms(d)),
      section("Guardrails", make("p", `Counted: ${d.counted.baseline} of the baseline, ${d.counted.candidate} of the candidate. Intervals hold at every look.`, { class: "note" }), guardrails(d)),
      section("Evidence over time", time), section("Distributions", spread),
      section("Do both say the same?", parity(d)), section("Copies", shadow(d)), section("Decisions", log(d)));
    if (window.uPlot) { overTime(time, d); distributions(spread, d); }
    else [time, spread].forEach((e) => e.append(make("p", "The charts could not be loaded; the tables tell the same.")));
    if (focus === "metric" && $("metric")) $("metric").focus();
    window.scrollTo(x, y);
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
      if (status === 200) { fresh(found); $("dialog").close(); }
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
    return [a.status, await a.json()];
  }
  function fresh(found) {
    doc = found; seenMs = performance.now(); wait = POLL_MS;
    try { show(doc); stale(""); } catch (e) { console.error(e); stale(`This page failed: ${e.message}`); }
  }
  function stale(why) {
    $("stale").hidden = !why;
    if ($("stale").textContent !== why) $("stale").textContent = why;
  }
  async function poll() {
    try {
      const [status, found] = await call("GET");
      if (status === 200) fresh(found);
      else {
        wait = Math.min(MOST_MS, wait * 2);
        stale(status === 401 || status === 403 ? "This link may not see the canary, or has ended: `disagg canary page POLICY` prints a new one." : `The gateway answered ${status}; what stands here may be old.`);
      }
    } catch (e) {
      wait = Math.min(MOST_MS, wait * 2);
      const age = doc ? Math.round((performance.now() - seenMs) / 1000) : null;
      stale(`The gateway does not answer (${e.message})` + (age === null ? "." : `; what stands here is ${age} s old.`));
    }
    setTimeout(poll, wait);
  }
  function begin() {
    if (embedded) { doc = JSON.parse(embedded.textContent); show(doc); return; }
    const given = new URLSearchParams(location.hash.slice(1)).get("token");
    if (given) {
      try { sessionStorage.setItem("disagg-canary", given); } catch (e) { /* private windows */ }
      history.replaceState(null, "", location.pathname);
    }
    try { token = given || sessionStorage.getItem("disagg-canary"); } catch (e) { token = given; }
    $("form").addEventListener("submit", send);
    $("cancel").addEventListener("click", () => $("dialog").close());
    let resized = 0;
    window.addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(() => { drawn = ""; if (doc) show(doc); }, 200); });
    poll();
  }
  begin();
})();
