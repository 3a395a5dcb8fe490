//! Invariants of a request's tensors and of the reply's.

use serde_json::Value;

use super::OUTPUTS;
use super::tensors::{Elements, InferRequest, OutputTensor, reply};

/// Checks that accepted inputs have distinct names and no more elements than the body can hold, and that the tensors of a
/// reply are described as they are.
pub(in crate::serve) fn check_tensors(body: &[u8], header_bytes: Option<usize>) {
    let Ok(request) = InferRequest::parse(body, header_bytes) else { return };
    let mut elements = 0;
    for (index, input) in request.inputs.iter().enumerate() {
        assert!(request.inputs[..index].iter().all(|other| other.name != input.name));
        elements += match &input.elements {
            Elements::Bytes(all) => all.len(),
            Elements::Integers(all) => all.len(),
            Elements::Floats(all) => all.len(),
            Elements::Bools(all) => all.len(),
        };
    }
    assert!(elements <= body.len(), "{elements} elements in {} bytes", body.len());
    let rows = ["an answer".to_owned(), String::new()];
    let (json, bytes) = reply(&request, "model", &OUTPUTS.map(|name| OutputTensor { name, rows: &rows }));
    let outputs = json["outputs"].as_array().unwrap();
    let size = |output: &Value| output["parameters"]["binary_data_size"].as_u64().unwrap_or(0);
    assert_eq!(outputs.iter().map(size).sum::<u64>(), bytes.len() as u64);
    assert!(
        outputs.iter().all(|output| size(output) > 0 || output["data"].as_array().is_some_and(|rows| rows.len() == 2))
    );
}
