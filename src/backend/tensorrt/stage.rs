//! Staging of constants: weights files hold E4M3 codes as `[in, out]`, and constants of a plan are `[out, in]`, so a
//! temporary file of the transposes is written before such a plan is compiled.

use super::pack::{stored, write_transposed};
use super::weights::PlanWeight;
use crate::error::{Error, Result};
use crate::tensor_file::{self, TensorFile};

/// Bytes copied at a time.
const PIECE_BYTES: usize = 1 << 20;

/// Writes a weights file of the weights that are embedded in a plan, as its constants have them. At most a few columns
/// of a matrix are in memory at a time, beside pages of the mapped file.
///
/// # Errors
/// [`Error::Format`] naming a weight that is missing from `packed` or has another shape; any error of `write`.
pub fn write(weights: &[PlanWeight], packed: &TensorFile, write: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let embedded = || weights.iter().filter(|weight| weight.in_plan);
    let mut header = Vec::new();
    for weight in embedded() {
        let (dtype, shape) = stored(weight)?;
        header.push((weight.name.as_str(), dtype, if weight.is_staged() { weight.shape_in_plan() } else { shape }));
    }
    write(&tensor_file::encode_header(&header)?)?;
    for weight in embedded() {
        let (dtype, shape) = stored(weight)?;
        let found = packed.tensor(&weight.name).filter(|(found, _)| found.dtype == dtype && found.shape == shape);
        let Some((_, bytes)) = found else {
            let detail =
                format!("there is no tensor {} of type {dtype:?}{shape:?}: build the package again", weight.name);
            return Err(Error::format(packed.path(), detail));
        };
        match (weight.is_staged(), shape.last()) {
            (true, Some(columns)) => write_transposed(bytes, *columns, write)?,
            _ => bytes.chunks(PIECE_BYTES).try_for_each(&mut *write)?,
        }
    }
    Ok(())
}
