//! Tensors of a request and a reply, as JSON or as bytes after it.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::serve::error::ApiError;

/// Most inputs and outputs of a request.
const MAX_TENSORS: usize = 64;
/// Most elements of a tensor that come as JSON, or that a shape may claim.
const MAX_ELEMENTS: usize = 1 << 20;

/// The JSON of a request.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[schema(as = InferRequest)]
pub(in crate::serve) struct Header {
    /// Returned as it is, as a string.
    #[serde(default)]
    #[schema(value_type = Value)]
    id: Option<Value>,
    #[schema(max_items = 64)]
    inputs: Vec<InputHeader>,
    /// The wanted outputs; all where none is named.
    #[serde(default)]
    #[schema(max_items = 64)]
    outputs: Vec<OutputHeader>,
    #[serde(default)]
    parameters: Parameters,
}

#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[schema(as = InferInput)]
pub(in crate::serve) struct InputHeader {
    /// `prompts`, or the name of a setting; `GET` of the model lists them.
    name: String,
    shape: Vec<usize>,
    #[schema(value_type = crate::serve::openapi::schemas::Datatype)]
    datatype: String,
    #[serde(default)]
    parameters: Parameters,
    /// The elements in row-major order, flat or nested, unless they come as bytes after the JSON.
    #[serde(default)]
    #[schema(value_type = Value)]
    data: Option<Value>,
}

#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[schema(as = InferRequestedOutput)]
pub(in crate::serve) struct OutputHeader {
    /// `outputs` or `sentences`; both are the answers.
    name: String,
    #[serde(default)]
    parameters: Parameters,
}

#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[schema(as = InferParameters)]
pub(in crate::serve) struct Parameters {
    /// Bytes of this input after the JSON.
    #[serde(default)]
    binary_data_size: Option<usize>,
    /// Return this output as bytes after the JSON.
    #[serde(default)]
    binary_data: Option<bool>,
    /// Return the outputs that are not listed so.
    #[serde(default)]
    binary_data_output: Option<bool>,
}

/// The elements of a tensor, in row-major order.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Elements {
    Bytes(Vec<Vec<u8>>),
    Integers(Vec<i64>),
    Floats(Vec<f64>),
    Bools(Vec<bool>),
}

/// An input of a request.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct InputTensor {
    pub name: String,
    pub elements: Elements,
}

/// A request's tensors.
#[derive(Debug)]
pub(super) struct InferRequest {
    pub id: Option<String>,
    pub inputs: Vec<InputTensor>,
    /// Names of the wanted outputs, and whether each is wanted as bytes; empty for all.
    pub outputs: Vec<(String, bool)>,
    /// Outputs that are not listed are wanted as bytes.
    pub is_binary: bool,
}

impl InferRequest {
    /// Reads a request; `header_bytes` of the body are JSON, and all of it by default.
    ///
    /// # Errors
    /// 400 naming the tensor whose shape, type and data do not fit each other.
    pub fn parse(body: &[u8], header_bytes: Option<usize>) -> Result<InferRequest, ApiError> {
        let split = header_bytes.unwrap_or(body.len());
        let Some((header, mut rest)) = body.split_at_checked(split) else {
            let message = format!("inference-header-content-length is {split}, but the body has {} bytes", body.len());
            return Err(ApiError::bad_request(message));
        };
        let header: Header = serde_json::from_slice(header)
            .map_err(|error| ApiError::bad_request(format!("the request's JSON is not as expected: {error}")))?;
        if header.inputs.len() > MAX_TENSORS || header.outputs.len() > MAX_TENSORS {
            return Err(ApiError::bad_request(format!("a request has at most {MAX_TENSORS} inputs and outputs")));
        }
        let mut inputs = Vec::with_capacity(header.inputs.len());
        for input in header.inputs {
            let name = crate::error::clip(&input.name);
            let elements =
                input.elements(&mut rest).map_err(|words| ApiError::bad_request(format!("input {name}: {words}")))?;
            if inputs.iter().any(|other: &InputTensor| other.name == input.name) {
                return Err(ApiError::bad_request(format!("input {name} is given twice")));
            }
            inputs.push(InputTensor { name: input.name, elements });
        }
        if !rest.is_empty() {
            return Err(ApiError::bad_request(format!("{} bytes follow the last input's data", rest.len())));
        }
        let is_binary = header.parameters.binary_data_output.unwrap_or(false);
        let outputs = header.outputs.into_iter();
        Ok(InferRequest {
            id: header.id.map(|id| id.as_str().map_or_else(|| id.to_string(), str::to_owned)),
            inputs,
            outputs: outputs.map(|output| (output.name, output.parameters.binary_data.unwrap_or(is_binary))).collect(),
            is_binary,
        })
    }
}

impl InputHeader {
    /// The elements, from the JSON or from the bytes of `rest`, which is advanced.
    fn elements(&self, rest: &mut &[u8]) -> Result<Elements, String> {
        let count = self.shape.iter().try_fold(1usize, |count, n| count.checked_mul(*n));
        let count = count.filter(|count| *count <= MAX_ELEMENTS);
        let count = count.ok_or_else(|| format!("shape {:?} has more than {MAX_ELEMENTS} elements", self.shape))?;
        let found = match (self.parameters.binary_data_size, &self.data) {
            (Some(bytes), None) => {
                let data = rest.split_off(..bytes);
                let data =
                    data.ok_or_else(|| format!("{bytes} bytes of data, but the body has {} left", rest.len()))?;
                self.of_bytes(data)?
            }
            (None, Some(data)) => self.of_json(data)?,
            (Some(_), Some(_)) => return Err("it has both data and binary_data_size".into()),
            (None, None) => return Err("it has neither data nor binary_data_size".into()),
        };
        match found.len() == count {
            true => Ok(found),
            false => Err(format!("{} elements, but shape {:?} has {count}", found.len(), self.shape)),
        }
    }

    fn of_bytes(&self, data: &[u8]) -> Result<Elements, String> {
        fn numbers<const N: usize, T>(data: &[u8], read: fn([u8; N]) -> T) -> Result<Vec<T>, String> {
            let (numbers, rest) = data.as_chunks::<N>();
            match rest.is_empty() {
                true => Ok(numbers.iter().map(|bytes| read(*bytes)).collect()),
                false => Err(format!("{} bytes are no whole number of elements of {N} bytes", data.len())),
            }
        }
        Ok(match self.datatype.as_str() {
            "BYTES" => {
                let (mut rest, mut strings) = (data, Vec::new());
                while !rest.is_empty() {
                    let (length, after) = rest.split_first_chunk::<4>().ok_or("a string's length is cut off")?;
                    let length = u32::from_le_bytes(*length) as usize;
                    let (string, after) = after.split_at_checked(length).ok_or("a string is cut off")?;
                    strings.push(string.to_vec());
                    rest = after;
                }
                Elements::Bytes(strings)
            }
            "BOOL" => Elements::Bools(data.iter().map(|byte| *byte != 0).collect()),
            "INT8" => Elements::Integers(numbers(data, |bytes| i64::from(i8::from_le_bytes(bytes)))?),
            "UINT8" => Elements::Integers(numbers(data, |bytes| i64::from(u8::from_le_bytes(bytes)))?),
            "INT16" => Elements::Integers(numbers(data, |bytes| i64::from(i16::from_le_bytes(bytes)))?),
            "UINT16" => Elements::Integers(numbers(data, |bytes| i64::from(u16::from_le_bytes(bytes)))?),
            "INT32" => Elements::Integers(numbers(data, |bytes| i64::from(i32::from_le_bytes(bytes)))?),
            "UINT32" => Elements::Integers(numbers(data, |bytes| i64::from(u32::from_le_bytes(bytes)))?),
            "INT64" => Elements::Integers(numbers(data, i64::from_le_bytes)?),
            // Seeds may use all 64 bits.
            "UINT64" => Elements::Integers(numbers(data, |bytes| u64::from_le_bytes(bytes) as i64)?),
            "FP16" => Elements::Floats(numbers(data, |bytes| half::f16::from_le_bytes(bytes).to_f64())?),
            "FP32" => Elements::Floats(numbers(data, |bytes| f64::from(f32::from_le_bytes(bytes)))?),
            "FP64" => Elements::Floats(numbers(data, f64::from_le_bytes)?),
            other => return Err(format!("datatype {} is not supported", crate::error::clip(other))),
        })
    }

    fn of_json(&self, data: &Value) -> Result<Elements, String> {
        let mut flat = Vec::new();
        flatten(data, &mut flat)?;
        let all = |wanted: &str| format!("its data is not all {wanted}");
        Ok(match self.datatype.as_str() {
            "BYTES" => {
                let strings = flat.iter().map(|value| value.as_str().map(|text| text.as_bytes().to_vec()));
                Elements::Bytes(strings.collect::<Option<_>>().ok_or_else(|| all("strings"))?)
            }
            "BOOL" => {
                Elements::Bools(flat.iter().map(|v| v.as_bool()).collect::<Option<_>>().ok_or_else(|| all("bools"))?)
            }
            "FP16" | "FP32" | "FP64" => {
                Elements::Floats(flat.iter().map(|v| v.as_f64()).collect::<Option<_>>().ok_or_else(|| all("numbers"))?)
            }
            name if name.starts_with("INT") || name.starts_with("UINT") => Elements::Integers(
                flat.iter().map(|v| v.as_i64()).collect::<Option<_>>().ok_or_else(|| all("integers"))?,
            ),
            other => return Err(format!("datatype {} is not supported", crate::error::clip(other))),
        })
    }
}

/// The elements of nested lists, in order. The JSON reader bounds their depth.
fn flatten<'v>(value: &'v Value, flat: &mut Vec<&'v Value>) -> Result<(), String> {
    match value {
        Value::Array(values) => values.iter().try_for_each(|value| flatten(value, flat)),
        value if flat.len() < MAX_ELEMENTS => {
            flat.push(value);
            Ok(())
        }
        _ => Err(format!("more than {MAX_ELEMENTS} elements")),
    }
}

impl Elements {
    fn len(&self) -> usize {
        match self {
            Elements::Bytes(all) => all.len(),
            Elements::Integers(all) => all.len(),
            Elements::Floats(all) => all.len(),
            Elements::Bools(all) => all.len(),
        }
    }
}

/// An output of strings, `[rows, 1]`. (A client that iterates over rows, and then over what is in them, would take
/// characters for answers if it were `[rows]`.)
pub(super) struct OutputTensor<'a> {
    pub name: &'a str,
    pub rows: &'a [String],
}

/// The JSON of a reply and the bytes that follow it.
pub(super) fn reply(request: &InferRequest, model: &str, outputs: &[OutputTensor<'_>]) -> (Value, Vec<u8>) {
    let mut bytes = Vec::new();
    let mut described = Vec::new();
    for OutputTensor { name, rows } in outputs {
        let wanted = request.outputs.iter().find(|(wanted, _)| wanted == name).map(|(_, is_binary)| *is_binary);
        let Some(is_binary) = wanted.or_else(|| request.outputs.is_empty().then_some(request.is_binary)) else {
            continue;
        };
        let mut output = json!({ "name": name, "datatype": "BYTES", "shape": [rows.len(), 1] });
        match is_binary {
            true => {
                let before = bytes.len();
                for row in *rows {
                    // Answers are far shorter than 4 GiB.
                    bytes.extend((row.len() as u32).to_le_bytes());
                    bytes.extend(row.as_bytes());
                }
                output["parameters"] = json!({ "binary_data_size": bytes.len() - before });
            }
            false => output["data"] = json!(rows),
        }
        described.push(output);
    }
    let mut reply = json!({ "model_name": model, "model_version": "1", "outputs": described });
    if let Some(id) = &request.id {
        reply["id"] = json!(id);
    }
    (reply, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(inputs: Value, data: &[u8]) -> Result<InferRequest, ApiError> {
        let header = json!({ "id": "0", "inputs": inputs, "outputs": [] }).to_string();
        let body = [header.as_bytes(), data].concat();
        InferRequest::parse(&body, Some(header.len()))
    }

    #[test]
    fn the_card_clients_tensors_are_read() {
        let binary = |name: &str, datatype: &str, size: usize| json!({ "name": name, "shape": [1, 1], "datatype": datatype, "parameters": { "binary_data_size": size } });
        let inputs = json!([
            binary("prompts", "BYTES", 7),
            binary("top_k", "INT64", 8),
            binary("top_p", "FP32", 4),
            binary("flag", "BOOL", 1)
        ]);
        let data = [&[3, 0, 0, 0][..], b"a\0b", &1i64.to_le_bytes(), &0f32.to_le_bytes(), &[1]].concat();
        let request = of(inputs, &data).unwrap();
        let elements: Vec<&Elements> = request.inputs.iter().map(|input| &input.elements).collect();
        let expected = [
            Elements::Bytes(vec![b"a\0b".to_vec()]),
            Elements::Integers(vec![1]),
            Elements::Floats(vec![0.0]),
            Elements::Bools(vec![true]),
        ];
        assert_eq!(elements, expected.iter().collect::<Vec<_>>());
        assert_eq!(request.id.as_deref(), Some("0"));
    }

    #[test]
    fn tensors_that_contradict_themselves_are_named() {
        let one = |shape: Value, datatype: &str, rest: Value| {
            let mut input = json!({ "name": "x", "shape": shape, "datatype": datatype });
            input.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
            json!([input])
        };
        let binary = |size: usize| json!({ "parameters": { "binary_data_size": size } });
        for (inputs, data, words) in [
            (one(json!([2]), "INT64", binary(8)), &[0; 8][..], "1 elements, but shape [2] has 2"),
            (one(json!([1]), "INT64", binary(9)), &[0; 8], "9 bytes of data, but the body has 8"),
            (one(json!([1]), "INT64", binary(7)), &[0; 7], "no whole number"),
            (one(json!([1]), "BYTES", binary(3)), &[1, 0, 0], "length is cut off"),
            (one(json!([1]), "BYTES", binary(4)), &[255; 4], "a string is cut off"),
            (one(json!([1]), "INT64", binary(8)), &[0; 9], "1 bytes follow"),
            (one(json!([1usize << 40, 1usize << 40]), "INT64", binary(8)), &[0; 8], "more than"),
            (one(json!([1]), "COMPLEX", binary(8)), &[0; 8], "COMPLEX is not supported"),
            (one(json!([1]), "INT64", json!({ "data": ["x"] })), &[], "not all integers"),
            (one(json!([1]), "INT64", json!({})), &[], "neither data nor"),
        ] {
            let error = of(inputs, data).unwrap_err();
            assert!(error.message.contains(words) && error.status.as_u16() == 400, "{}", error.message);
        }
        assert!(InferRequest::parse(b"{}", Some(3)).is_err());
        assert!(InferRequest::parse(b"\xff", None).is_err());
    }

    #[test]
    fn replies_are_bytes_or_json_as_each_output_is_wanted() {
        let mut request = of(json!([]), &[]).unwrap();
        let rows = ["é".to_owned(), String::new()];
        let outputs = ["outputs", "sentences"].map(|name| OutputTensor { name, rows: &rows });
        request.outputs = vec![("outputs".into(), true)];
        let (reply_json, bytes) = reply(&request, "m", &outputs);
        assert_eq!(bytes, [2, 0, 0, 0, 0xc3, 0xa9, 0, 0, 0, 0]);
        assert_eq!(reply_json["outputs"].as_array().unwrap().len(), 1);
        assert_eq!(reply_json["outputs"][0]["shape"], json!([2, 1]));
        request.outputs.clear();
        let (reply_json, bytes) = reply(&request, "m", &outputs);
        assert!(bytes.is_empty());
        assert_eq!(reply_json["outputs"][1]["data"], json!(rows));
    }
}
