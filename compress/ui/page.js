window.espalier = (() => {
  const MINE = "espalier-runs", KEYS = "espalier-keys", LOOK = "espalier-look";
  const LANGUAGES = ["en"];  // the server writes those that the page has

  const read = (key) => { try { return localStorage.getItem(key); } catch { return null; } };
  const write = (key, value) => { try { localStorage.setItem(key, value); } catch { /* private window: nothing is kept */ } };
  const mine = () => { try { const kept = JSON.parse(read(MINE) || "[]"); return Array.isArray(kept) ? kept : []; } catch { return []; } };
  const keys = () => { try { return new Map(Object.entries(JSON.parse(read(KEYS) || "{}"))); } catch { return new Map(); } };
  const job = () => new URLSearchParams(location.search).get("job") || "";
  const viewport = () => [document.body.classList.contains("dark") ? "dark" : "light", innerWidth < 720 ? "narrow" : "wide"].join(" ");

  function context() {
    const chosen = read(LOOK);
    if (chosen) document.body.classList.toggle("dark", chosen === "dark");
    const asked = new URLSearchParams(location.search);
    const ticked = [...document.querySelectorAll("#runs input:checked")].map((box) => box.value);
    return JSON.stringify({ job: job(), key: keys().get(job()) || "", again: asked.get("again") || "", compare: asked.getAll("compare"), mine: mine(), ticked, viewport: viewport() });
  }

  function opened(id, key) {
    if (!id || id === job()) return;
    const known = [id, ...mine().filter((other) => other !== id)].slice(0, 100);
    write(MINE, JSON.stringify(known));
    const kept = keys().set(id, key);
    write(KEYS, JSON.stringify(Object.fromEntries(known.filter((one) => kept.has(one)).map((one) => [one, kept.get(one)]))));
    history.pushState(null, "", "?job=" + encodeURIComponent(id));
    scrollTo({ top: 0 });
  }

  // Gradio fills new rows into the elements of old ones, which keep what was ticked in them
  function retick() {
    document.querySelectorAll("#runs input").forEach((box) => { box.checked = box.hasAttribute("checked"); });
  }

  const language = () => LANGUAGES.find((known) => known === navigator.language) || "en";
  const text = (key) => window.gradio_config?.i18n_translations?.[language()]?.["espalier:" + key] || key;
  const sure = () => confirm(text("delete_sure"));

  function left(id) {
    if (!id) location.assign("./");
  }

  // Gradio draws the plan anew whenever a slider moves; what was unfolded in it stays so
  const unfolded = new Set();
  const fold = (part) => part.querySelector("summary").textContent.replace(/ \(\d.*/, "");
  document.addEventListener("toggle", ({ target }) => {
    if (target.matches?.(".plan details")) unfolded[target.open ? "add" : "delete"](fold(target));
  }, true);
  const unfold = () => document.querySelectorAll(".plan details:not([open])").forEach((part) => { part.open = unfolded.has(fold(part)); });

  // whoever leaves the page ends what Gradio still reads from the server; that is no error to tell of
  let leaving = false;
  addEventListener("beforeunload", () => { leaving = true; });
  // pageshow also ends a first load, which may come after the click that leaves; a page that is shown again is "persisted"
  addEventListener("pageshow", (event) => { if (event.persisted) leaving = false; });
  addEventListener("unhandledrejection", (event) => { if (leaving && event.reason?.name === "AbortError") event.preventDefault(); });

  async function copy(text) {
    if (navigator.clipboard) return navigator.clipboard.writeText(text);
    const area = Object.assign(document.createElement("textarea"), { value: text });  // a page that is not from https
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }

  document.addEventListener("click", async (event) => {
    const button = event.target.closest?.("button.copy");
    if (!button) return;
    await copy(button.closest(".copied").querySelector("pre").textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });

  function toggle() {
    const dark = document.body.classList.toggle("dark");
    write(LOOK, dark ? "dark" : "light");
    return viewport();
  }

  // Gradio names an upload field other than it reads; without that name its visible text counts
  const renamed = () => document.querySelectorAll("button.upload-container[aria-label]").forEach((field) => field.removeAttribute("aria-label"));
  // Gradio names the visitor's language as the page's, also where the page's texts are English
  const spoken = () => { if (document.documentElement.lang !== language()) document.documentElement.lang = language(); };
  new MutationObserver(() => { renamed(); spoken(); unfold(); }).observe(document.documentElement, { childList: true, subtree: true, attributeFilter: ["lang"] });

  addEventListener("popstate", () => location.reload());
  spoken();
  return { context, opened, retick, sure, left, toggle };
})();
