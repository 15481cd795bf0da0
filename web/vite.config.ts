import { copyFileSync, readFileSync } from "node:fs";
import { defineConfig, type Plugin } from "vite";

/** Headers that let WebAssembly use threads; the Hub sends them because README.md asks for them. */
const ISOLATION = {
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Opener-Policy": "same-origin",
};

/** Completes the Space: the list of files that work offline, and the card. */
function completeSpace(): Plugin {
  return {
    name: "complete-space",
    apply: "build",
    generateBundle(_options, bundle) {
      const files = Object.keys(bundle).filter((name) => !name.endsWith(".wasm"));
      const version = JSON.stringify(files.sort().join());
      const source = readFileSync("src/sw.js", "utf-8")
        .replace("__FILES__", JSON.stringify(["./", ...files.filter((name) => name !== "index.html")]))
        .replace("__VERSION__", version);
      this.emitFile({ type: "asset", fileName: "sw.js", source });
    },
    writeBundle({ dir }) {
      copyFileSync("README.md", `${dir}/README.md`);
    },
  };
}

export default defineConfig({
  base: "./",
  build: { target: "es2022", assetsInlineLimit: 0, chunkSizeWarningLimit: 1000 },
  worker: { format: "es" },
  server: { headers: ISOLATION, fs: { allow: [".."] } },
  preview: { headers: ISOLATION },
  // Its files are found by their addresses beside the module, which bundling for development would move.
  optimizeDeps: { exclude: ["onnxruntime-web"] },
  plugins: [completeSpace()],
});
