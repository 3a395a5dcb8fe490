//! Fuzz target of the CPU plan reader; see [`crate::fuzzing`].

use super::select::parse_program;
use crate::fuzzing::check_message;

/// Parses a CPU plan (without weights): an accepted one round-trips, and its buffers lie within the arena.
pub fn plan(bytes: &[u8]) {
    let program = match parse_program(bytes) {
        Ok(program) => program,
        Err(message) => return check_message(&message),
    };
    if let Err(message) = program.validate() {
        return check_message(&message);
    }
    let text = serde_json::to_vec(&program).unwrap();
    assert_eq!(parse_program(&text).unwrap(), program);

    let ends = program.buffers.iter().map(|b| b.offset as u128 + b.max_bytes(&program.limits).unwrap() as u128);
    assert!(ends.max().unwrap_or(0) <= program.arena_bytes as u128);
    assert!(program.weights.iter().all(|weight| weight.stored_bytes().is_some() && weight.unit_rows() > 0));
    assert!(program.cache.total_bytes(&program.limits).is_some());
    assert_eq!(program.to_string().lines().count(), program.kernels.len());
}
