"use strict";
// Talking to the server, the token, and small things that every view uses. Text from the index is only ever set
// as textContent.

const byId = (id) => document.getElementById(id);

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

class ServerError extends Error {
  constructor(status, answer) {
    super(answer.error || "the server did not answer as expected");
    this.status = status;
    this.expected = answer.expected;
    this.nextStep = answer.next_step;
  }
}

async function ask(path, options = {}, isRetry = false) {
  const token = sessionStorage.getItem("token");
  const headers = new Headers(options.headers || {});
  if (token) headers.set("Authorization", `Bearer ${token}`);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, { error: "The server does not answer. Is it still running?" });
  }
  if (answer.ok) return answer.status === 204 ? null : answer.json();
  const reason = await answer.json().catch(() => ({}));
  if (answer.status === 401 && !isRetry && (await askForToken())) return ask(path, options, true);
  throw new ServerError(answer.status, reason);
}

let tokenAsked = null;
function askForToken() {
  if (tokenAsked) return tokenAsked; // several requests need it at once, a person is asked once
  const dialog = byId("ask-token");
  tokenAsked = new Promise((resolve) => {
    const end = (got) => { dialog.close(); tokenAsked = null; resolve(got); };
    byId("token-message").textContent = "";
    byId("token").value = "";
    byId("token-form").onsubmit = async (event) => {
      event.preventDefault();
      const token = byId("token").value.trim();
      const answer = await fetch("login", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ token }),
      }).catch(() => null);
      if (answer && answer.ok) {
        sessionStorage.setItem("token", token);
        end(true);
      } else {
        byId("token-message").textContent = "This is not the token.";
      }
    };
    byId("token-cancel").onclick = () => end(false);
    dialog.oncancel = () => end(false);
    dialog.showModal();
  });
  return tokenAsked;
}

function complain(error) {
  const parts = [error.message];
  if (error.expected) parts.push(`Expected: ${error.expected}.`);
  const box = byId("message");
  box.firstElementChild.textContent = parts.join(". ").replace("..", ".");
  box.hidden = false;
}

function quiet() {
  byId("message").hidden = true;
}

byId("message").querySelector("button").addEventListener("click", quiet);

const isDark = () => document.documentElement.classList.contains("dark");

function setTheme(name) {
  document.documentElement.classList.toggle("dark", name === "dark");
  document.documentElement.classList.toggle("light", name === "light");
  document.dispatchEvent(new Event("theme"));
}

const systemDark = matchMedia("(prefers-color-scheme: dark)");
setTheme(localStorage.getItem("theme") || (systemDark.matches ? "dark" : "light"));
systemDark.addEventListener("change", (event) => {
  if (!localStorage.getItem("theme")) setTheme(event.matches ? "dark" : "light");
});
byId("theme").addEventListener("click", () => {
  localStorage.setItem("theme", isDark() ? "light" : "dark");
  setTheme(localStorage.getItem("theme"));
});
