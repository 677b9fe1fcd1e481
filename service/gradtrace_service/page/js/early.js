// Not a module: it runs before the first paint, which would otherwise flash in the other scheme.
try {
  const theme = localStorage.getItem("gradtrace-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // storage is forbidden: the browser's own scheme it is
}
