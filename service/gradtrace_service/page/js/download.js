// Files that people keep.

/** By a link to what was fetched: the key travels in a header. @param {Response} response @param {string} name */
export async function save(response, name) {
  const address = URL.createObjectURL(await response.blob());
  Object.assign(document.createElement("a"), { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
