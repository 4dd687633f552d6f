// SAM's arithmetic around the two networks: from a picture to the encoder's input, and from low-res logits to a mask.

const BITS = 22; // of the fixed-point weights with which PIL resizes 8-bit pictures

// Return [h, w] of a picture whose longest side becomes `side`; no side falls below one pixel.
export function resizedSize(height, width, side) {
  const scale = side / Math.max(height, width);
  return [height, width].map((value) => Math.max(1, Math.floor(value * scale + 0.5)));
}

// Return the weights by which PIL's bilinear filter, which covers all pixels when it shrinks, maps `from` to `to` pixels.
function triangle(from, to) {
  const scale = from / to, support = Math.max(scale, 1), starts = [], weights = [];
  for (let i = 0; i < to; i++) {
    const centre = (i + 0.5) * scale;
    const start = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(from, Math.trunc(centre + support + 0.5));
    const raw = Array.from({ length: end - start }, (_, k) =>
      Math.max(0, 1 - Math.abs((start + k - centre + 0.5) / support)));
    const sum = raw.reduce((a, b) => a + b, 0);
    starts.push(start);
    weights.push(Int32Array.from(raw, (value) => Math.trunc(value / sum * (1 << BITS) + 0.5)));
  }
  return { starts, weights };
}

// Resample the rows or columns of RGBA pixels; `along` and `across` are the distances in the array of two neighbours on
// the resampled and on the other axis.
function resample(pixels, lines, to, filter, from, into) {
  const out = new Uint8ClampedArray(4 * lines * to);
  for (let line = 0; line < lines; line++) {
    for (let i = 0; i < to; i++) {
      const weights = filter.weights[i];
      let at = line * from.across + filter.starts[i] * from.along, r = 1 << BITS - 1, g = r, b = r;
      for (let k = 0; k < weights.length; k++, at += from.along) {
        r += pixels[at] * weights[k]; g += pixels[at + 1] * weights[k]; b += pixels[at + 2] * weights[k];
      }
      const place = line * into.across + i * into.along;
      out[place] = r >> BITS; out[place + 1] = g >> BITS; out[place + 2] = b >> BITS;
    }
  }
  return out;
}

// Return RGBA pixels (height, width) resized to (h, w), RGB bit for bit as by PIL's BILINEAR: rows first, then columns.
export function resize(pixels, height, width, h, w) {
  if (w !== width) {
    pixels = resample(pixels, height, w, triangle(width, w), { across: 4 * width, along: 4 }, { across: 4 * w, along: 4 });
  }
  if (h !== height) {
    pixels = resample(pixels, w, h, triangle(height, h), { across: 4, along: 4 * w }, { across: 4, along: 4 * w });
  }
  return pixels;
}

// Return the encoder's input, float32 (3, side, side), from RGBA pixels (h, w): (x - mean) / std, 0 at the right and
// bottom.
export function normalised(pixels, h, w, side, mean, std) {
  const input = new Float32Array(3 * side * side);
  for (let channel = 0; channel < 3; channel++) {
    for (let y = 0; y < h; y++) {
      let out = (channel * side + y) * side;
      for (let x = 0, at = 4 * y * w + channel; x < w; x++, at += 4) {
        input[out++] = (pixels[at] - mean[channel]) / std[channel];
      }
    }
  }
  return input;
}

// Return the two neighbours, and the second one's weight, at each of `to` places of torch's bilinear upsampling.
function neighbours(from, to) {
  return Array.from({ length: to }, (_, i) => {
    const place = Math.max(0, (i + 0.5) * from / to - 0.5), low = Math.min(Math.floor(place), from - 1);
    return [low, Math.min(low + 1, from - 1), place - low];
  });
}

// Return four places and weights for each of `to` pixels: logits of `from` go to the encoder's `side`, are cropped to
// `inside`, and go to the picture, as in SAM; both steps are linear, so one pass does them.
function composed(from, side, inside, to) {
  const first = neighbours(from, side), second = neighbours(inside, to);
  const places = new Int32Array(4 * to), weights = new Float64Array(4 * to);
  second.forEach(([low, high, weight], i) => {
    [[low, 1 - weight], [high, weight]].forEach(([at, outer], half) => {
      const [near, far, inner] = first[at];
      places.set([near, far], 4 * i + 2 * half);
      weights.set([outer * (1 - inner), outer * inner], 4 * i + 2 * half);
    });
  });
  return { places, weights };
}

// Return the mask, 1 inside and 0 outside, of (height, width) pixels, from low-res logits (n, n) of a picture that was
// resized to (h, w) in the encoder's square.
export function maskOf(logits, n, side, [h, w], [height, width]) {
  const columns = composed(n, side, w, width), rows = composed(n, side, h, height);
  const wide = new Float32Array(n * width), bits = new Uint8Array(height * width);
  for (let y = 0; y < n; y++) {
    for (let x = 0, k = 0; x < width; x++, k += 4) {
      let sum = 0;
      for (let j = k; j < k + 4; j++) sum += columns.weights[j] * logits[y * n + columns.places[j]];
      wide[y * width + x] = sum;
    }
  }
  for (let y = 0, k = 0; y < height; y++, k += 4) {
    const [p, q, r, s] = rows.places.subarray(k, k + 4).map((row) => row * width);
    const [a, b, c, d] = rows.weights.subarray(k, k + 4);
    for (let x = 0, i = y * width; x < width; x++, i++) {
      bits[i] = a * wide[p + x] + b * wide[q + x] + c * wide[r + x] + d * wide[s + x] > 0 ? 1 : 0;
    }
  }
  return bits;
}

// Return the decoder's points, float32 (1, K, 2) in pixels of the resized picture, and labels, float32 (1, K), of a
// prompt in shares of the picture; without a box, SAM takes a padding point with label -1.
export function promptTensors({ points, box }, [h, w]) {
  const places = points.map(([x, y, label]) => [x * w, y * h, label]);
  if (box) places.push([box[0] * w, box[1] * h, 2], [box[2] * w, box[3] * h, 3]);
  else places.push([0, 0, -1]);
  return {
    coords: Float32Array.from(places.flatMap(([x, y]) => [x, y])),
    labels: Float32Array.from(places, (place) => place[2]),
  };
}

// Return the number of the mask to show: of one point, the best by prediction of masks 1 to 3, otherwise mask 0, which
// is trained for prompts that leave no doubt.
export function choose(predicted, { points, box, mask }) {
  if (mask !== "auto") return Math.min(+mask, predicted.length - 1);
  if (box || points.length !== 1 || predicted.length < 2) return 0;
  return 1 + predicted.slice(1).reduce((best, value, i, all) => value > all[best] ? i : best, 0);
}
