//! Fuzz target of the safetensors reader; see [`crate::fuzzing`].

use safetensors::SafeTensors;

use super::{encode_header, parse};
use crate::fuzzing::check_message;

/// A safetensors file: the tensors cover its data exactly, the reference implementation accepts it too and sees the
/// same, and a header written for these tensors says the same again.
pub fn safetensors(bytes: &[u8]) {
    let (tensors, _) = match parse(bytes) {
        Ok(parsed) => parsed,
        Err(message) => return check_message(&message),
    };
    assert!(tensors.iter().skip(1).zip(&tensors).all(|(after, before)| before.name < after.name));

    let mut in_order: Vec<_> = tensors.iter().collect();
    in_order.sort_by_key(|tensor| (tensor.bytes.start, tensor.bytes.end));
    let header_bytes = bytes.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
    let mut end = 8 + header_bytes as usize;
    for tensor in &in_order {
        assert_eq!(tensor.bytes.start, end, "{tensor:?}");
        let bits = tensor.shape.iter().product::<usize>() * tensor.dtype.bitsize();
        assert_eq!(tensor.bytes.len() * 8, bits, "{tensor:?}");
        end = tensor.bytes.end;
    }
    assert_eq!(end, bytes.len());

    let reference = SafeTensors::deserialize(bytes).unwrap();
    assert_eq!(reference.len(), tensors.len());
    for tensor in &tensors {
        let view = reference.tensor(&tensor.name).unwrap();
        assert_eq!((view.dtype(), view.shape()), (tensor.dtype, tensor.shape.as_slice()));
        assert_eq!(view.data().as_ptr_range(), bytes[tensor.bytes.clone()].as_ptr_range());
    }

    let described: Vec<_> = in_order.iter().map(|t| (t.name.as_str(), t.dtype, t.shape.clone())).collect();
    let mut again = encode_header(&described).unwrap();
    let shift = again.len() as isize - (8 + header_bytes as isize);
    again.extend_from_slice(&bytes[8 + header_bytes as usize..]);
    let (rewritten, _) = parse(&again).unwrap();
    assert_eq!(rewritten.len(), tensors.len());
    for (new, old) in rewritten.iter().zip(&tensors) {
        assert_eq!((&new.name, new.dtype, &new.shape), (&old.name, old.dtype, &old.shape));
        assert_eq!(Some(new.bytes.start), old.bytes.start.checked_add_signed(shift));
    }
}
