//! The `aotron` program.
fn main() {}
