//! The HTTP server, as clients see it: raw bytes over sockets, so that nothing between hides what is on the wire.

/// Keys, names, limits and the rest that is not about answers.
mod access;
/// Clients that are slow, wrong or hostile.
mod hostile;
/// KServe's protocol with the bytes that NeMo's clients send.
mod kserve;
/// Load, disconnection and the end of the server.
mod load;
/// OpenAI's and Anthropic's APIs.
mod openai;
/// Refusals, and the fields that they name.
mod refusals;
/// A server and an HTTP client for the tests below.
mod server;
/// What is said before the server listens, and of packages that cannot be served.
mod start;
/// HTTPS.
mod tls;
