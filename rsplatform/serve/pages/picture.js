// A picture of the user's as the API takes it: a data URL, made smaller in the browser where it is too large to send.
const MAX_SIDE_PX = 2048; // more than the model sees
const MAX_BYTES = 4 * 2 ** 20;
const MAX_CHARACTERS = 8 * 2 ** 20; // the API's own limit
const JPEG_QUALITY = 0.9;

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("This file cannot be read."));
    reader.readAsDataURL(blob);
  });
}

// The bitmap as a JPEG no longer than MAX_SIDE_PX on any side; null where the browser gives none.
function encode(bitmap) {
  const factor = Math.min(1, MAX_SIDE_PX / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * factor));
  canvas.height = Math.max(1, Math.round(bitmap.height * factor));
  const context = canvas.getContext("2d", { alpha: false });
  if (!context) return null;
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", JPEG_QUALITY));
}

// A smaller copy; null where none is needed, or where the browser cannot decode the file: then the server judges it.
async function smaller(file) {
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) return null;
  const isFine = Math.max(bitmap.width, bitmap.height) <= MAX_SIDE_PX && file.size <= MAX_BYTES;
  const copy = isFine ? null : await encode(bitmap);
  bitmap.close();
  return copy;
}

export async function readPicture(file) {
  const picture = await dataUrl((await smaller(file)) ?? file);
  if (picture.length <= MAX_CHARACTERS) return picture;
  throw new Error("This picture is too large to send, and this browser cannot make it smaller. Save it as a JPEG, PNG or WebP of at most 2048 pixels a side.");
}
