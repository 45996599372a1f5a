window.espalier = (() => {
  const MINE = "espalier-runs", LOOK = "espalier-look";

  const read = (key) => { try { return localStorage.getItem(key); } catch { return null; } };
  const write = (key, value) => { try { localStorage.setItem(key, value); } catch { /* private window: nothing is kept */ } };
  const mine = () => { try { const kept = JSON.parse(read(MINE) || "[]"); return Array.isArray(kept) ? kept : []; } catch { return []; } };
  const job = () => new URLSearchParams(location.search).get("job") || "";
  const look = () => [document.body.classList.contains("dark") ? "dark" : "light", innerWidth < 720 ? "narrow" : "wide"].join(" ");

  function context() {
    const chosen = read(LOOK);
    if (chosen) document.body.classList.toggle("dark", chosen === "dark");
    const asked = new URLSearchParams(location.search);
    const ticked = [...document.querySelectorAll("#runs input:checked")].map((box) => box.value);
    return JSON.stringify({ job: job(), again: asked.get("again") || "", compare: asked.getAll("compare"), mine: mine(), ticked, look: look() });
  }

  function opened(id) {
    if (!id || id === job()) return;
    write(MINE, JSON.stringify([id, ...mine().filter((other) => other !== id)].slice(0, 100)));
    history.pushState(null, "", "?job=" + encodeURIComponent(id));
    scrollTo({ top: 0 });
  }

  // Gradio fills new rows into the elements of old ones, which keep what was ticked in them
  function retick() {
    document.querySelectorAll("#runs input").forEach((box) => { box.checked = box.hasAttribute("checked"); });
  }

  function left(id) {
    if (!id) location.assign("./");
  }

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
    return look();
  }

  // Gradio names an upload field other than it reads; without that name its visible text counts
  const renamed = () => document.querySelectorAll("button.upload-container[aria-label]").forEach((field) => field.removeAttribute("aria-label"));
  new MutationObserver(renamed).observe(document.documentElement, { childList: true, subtree: true });

  addEventListener("popstate", () => location.reload());
  document.documentElement.lang = "en";
  return { context, opened, retick, left, toggle };
})();
