/** Keeps the page itself for use without a network. Weights and WebAssembly are kept by files.ts. */

const CACHE = `flashsloth-page-${hash(__VERSION__)}`;
const FILES = __FILES__.map((name) => new URL(name, self.registration.scope).href);

function hash(text) {
  return Array.from(text).reduce((sum, letter) => (Math.imul(sum, 31) + letter.charCodeAt(0)) >>> 0, 7);
}

self.addEventListener("install", (event) => {
  event.waitUntil(
    caches
      .open(CACHE)
      .then((cache) => cache.addAll(FILES.map((file) => new Request(file, { cache: "no-cache" }))))
      .then(() => self.skipWaiting()),
  );
});

self.addEventListener("activate", (event) => {
  const isOld = (name) => name.startsWith("flashsloth-page-") && name !== CACHE;
  event.waitUntil(
    caches
      .keys()
      .then((names) => Promise.all(names.filter(isOld).map((name) => caches.delete(name))))
      .then(() => self.clients.claim()),
  );
});

self.addEventListener("fetch", (event) => {
  const address = new URL(event.request.url);
  address.search = address.hash = "";
  if (address.pathname.endsWith("/index.html")) address.pathname = address.pathname.slice(0, -"index.html".length);
  if (event.request.method !== "GET" || !FILES.includes(address.href)) return;
  const fromCache = () => caches.open(CACHE).then((cache) => cache.match(address.href));
  // The page itself may have changed; its other files have names that change with their content.
  const isPage = address.href === self.registration.scope;
  event.respondWith(
    isPage ? fetch(event.request).catch(fromCache) : fromCache().then((response) => response ?? fetch(event.request)),
  );
});
