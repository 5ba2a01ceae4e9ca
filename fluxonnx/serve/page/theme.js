// Light or dark: as the system says, unless the person chose one.

const STORED = "fluxonnx.theme";

export function startTheme(select) {
  const apply = (theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  };
  const stored = localStorage.getItem(STORED);
  select.value = ["light", "dark"].includes(stored) ? stored : "auto";
  apply(select.value);
  select.addEventListener("change", () => {
    localStorage.setItem(STORED, select.value);
    apply(select.value);
  });
}
