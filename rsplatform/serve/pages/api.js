// The server's API as the page calls it: errors in words, and the API key, where the server asks for one, on every
// request, pictures and tiles included. The key stays in this tab.
const KEY = "api-key";

export class KeyNeeded extends Error {}

export function keyHeaders() {
  const key = sessionStorage.getItem(KEY);
  return key ? { authorization: `Bearer ${key}` } : {};
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

export async function call(path, body) {
  const headers = { ...keyHeaders(), ...(body && { "content-type": "application/json" }) };
  let response;
  try {
    response = await fetch(path, body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers });
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  const words = typeof answer.detail === "string" ? answer.detail : `The server answered ${response.status}.`;
  throw response.status === 401 ? new KeyNeeded(words) : new Error(words);
}

// An <img> cannot send a key: then its bytes are fetched, and the image shows them.
export async function showPicture(image, url) {
  image.addEventListener("error", () => image.classList.add("gone"), { once: true });
  if (!sessionStorage.getItem(KEY)) {
    image.src = url;
    return;
  }
  const response = await fetch(url, { headers: keyHeaders() }).catch(() => null);
  if (!response?.ok) return image.classList.add("gone");
  const place = URL.createObjectURL(await response.blob());
  image.addEventListener("load", () => URL.revokeObjectURL(place), { once: true });
  image.src = place;
}
