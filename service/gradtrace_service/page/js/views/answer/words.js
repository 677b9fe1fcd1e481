// Words that two texts share, but those that all texts share.
const COMMON = new Set(
  (
    "a about after all also an and any are as at be been but by can could did do does for from had has have he her him his " +
    "how i if in into is it its just like many may more most no not of on one only or other our out over she so some such " +
    "than that the their them then there these they this to two up was we were what when which who will with would you your"
  ).split(" "),
);

/** @param {string} text */
const wordsOf = (text) =>
  new Set((text.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? []).filter((word) => word.length > 1 && !COMMON.has(word)));

/** In lower case. @param {string} one @param {string} other */
export function sharedWords(one, other) {
  const words = wordsOf(one);
  return new Set([...wordsOf(other)].filter((word) => words.has(word)));
}
