//! Repacks a CPU plan for another CPU from the package's own weights: no checkpoint is needed, and no weight changes,
//! only its layout.

use rayon::prelude::*;

use super::finish::take_weights_settings;
use super::{Calibration, PlanSummary, Progress, Recipe, optimized_graph, plan_info};
use crate::backend::constants::stored_dtype;
use crate::backend::cpu::lower::lower;
use crate::backend::cpu::pack;
use crate::backend::cpu::program::{Program, Storage, WeightSpec};
use crate::backend::cpu_program;
use crate::backend::packing::rows_per_piece;
use crate::engine::{Package, PackageFile, PackageWriter, PlanInfo};
use crate::error::{Error, Result};
use crate::tensor_file::{self, TensorFile};

/// Starts the line that repacking adds to the stored recipe.
const PACKED_AGAIN: &str = "# Packed again for the CPU ";

/// Writes the package's CPU plan and weights for the CPU of `recipe`, with its `activations`, if it names them. Limits are
/// those of a recipe file; of a built-in recipe nothing else is taken. Returns the plan's entry in the manifest.
///
/// # Errors
/// [`Error::Package`] if there is no CPU plan, or its weights are damaged or do not match its model; [`Error::Recipe`] if
/// a recipe file asks for what those weights are not.
pub(super) fn repack(
    package: &Package,
    recipe: &Recipe,
    writer: &mut PackageWriter,
    progress: &dyn Progress,
) -> Result<(PlanInfo, PlanSummary)> {
    let (old, program) = cpu_program(package)?;
    program.validate().map_err(|detail| Error::package(package.path(), format!("its CPU plan: {detail}")))?;
    let mut recipe = recipe.clone();
    take_weights_settings(package, old, &mut recipe)?;
    let quantizes = recipe.quantize_activations.unwrap_or(program.quantizes_activations());
    recipe.quantize_activations = Some(quantizes);
    recipe.check()?;
    let target = recipe.cpu_target()?;
    let (made_by, limits) = match recipe.is_built_in() {
        true => (&old.recipe, old.limits.clone()),
        false => (&recipe.text, recipe.step_limits(old.limits.max_sequence_tokens, &package.manifest().model)),
    };
    let mut lines: Vec<&str> = made_by.lines().filter(|line| !line.starts_with(PACKED_AGAIN)).collect();
    let stated = Recipe::parse(&recipe.name, made_by).ok().and_then(|stated| stated.quantize_activations);
    let activations = match quantizes {
        true if stated != Some(true) => ", with activations = \"int8\"",
        false if stated == Some(true) => ", with activations = \"float\"",
        _ => "",
    };
    let packed_again = format!("{PACKED_AGAIN}{}{activations}\n", target.features);
    lines.push(&packed_again);
    recipe.text = lines.join("\n");

    let file = TensorFile::open(&package.file_path(&old.weights))?;
    progress.stage("verifying", file.mapped().len() as u64);
    package.verify_file(&old.weights, &|bytes| progress.advance(bytes))?;
    let calibration = Calibration::of_program(&program);
    let model = &package.manifest().model;
    let (graph, reports) =
        optimized_graph(model, recipe.precision, old.limits.max_sequence_tokens, Some(&calibration))?;
    let lowered = lower(&graph, &limits, target)?.program;

    if lowered.weights.len() != program.weights.len() {
        let (found, expected) = (program.weights.len(), lowered.weights.len());
        let detail = format!(
            "its CPU plan has {found} weights, but its model has {expected}; build it from the checkpoint again"
        );
        return Err(Error::package(package.path(), detail));
    }
    let specs: Vec<&WeightSpec> =
        pack::file_order(&lowered.weights).into_iter().map(|index| &lowered.weights[index]).collect();
    progress.stage("packing", pack::packed_bytes(&lowered.weights));
    let header: Vec<_> = specs.iter().map(|s| (s.name.as_str(), stored_dtype(s.dtype), s.stored_shape())).collect();
    let mut out = writer.create_file(&old.weights)?;
    out.write(&tensor_file::encode_header(&header)?)?;
    for spec in specs {
        write_weight(package, &program, &file, spec, &mut out, progress)?;
    }
    writer.push(out.finish()?);
    let plan = old.plan.clone().unwrap_or_else(|| "plans/cpu.json".into());
    let text = serde_json::to_vec(&lowered)
        .map_err(|e| Error::package(package.path(), format!("the plan cannot be written as JSON: {e}")))?;
    writer.add(&plan, |write| write(&text))?;
    let kv_bytes_per_token = lowered.cache.bytes_per_token();
    let info = plan_info(&recipe, Some(plan), old.weights.clone(), limits, kv_bytes_per_token, None);
    let summary = PlanSummary::of(&info, None, reports);
    Ok((info, summary))
}

/// Repacks one weight from the layout of `program` to that of `spec`.
fn write_weight(
    package: &Package,
    program: &Program,
    file: &TensorFile,
    spec: &WeightSpec,
    out: &mut PackageFile,
    progress: &dyn Progress,
) -> Result<()> {
    let refuse = |detail: &str| {
        let detail = format!("weight {} {detail}; build the package from the checkpoint again", spec.name);
        Error::package(package.path(), detail)
    };
    let old = program.weights.iter().find(|old| old.name == spec.name).ok_or_else(|| refuse("is not in it"))?;
    let (stored, bytes) = file.tensor(&spec.name).ok_or_else(|| refuse("is not in its file"))?;
    if (old.rows, old.columns, old.dtype) != (spec.rows, spec.columns, spec.dtype) {
        return Err(refuse("has another shape than its model"));
    }
    if stored.shape != old.stored_shape() || stored.dtype != stored_dtype(old.dtype) {
        return Err(refuse("is stored in another shape than its plan says"));
    }
    if old.storage == spec.storage {
        for piece in bytes.chunks(1 << 20) {
            out.write(piece)?;
            advance(progress, piece.len())?;
        }
        return Ok(());
    }
    let (Storage::Packed { packing: from, operand }, Storage::Packed { packing: to, .. }) = (old.storage, spec.storage)
    else {
        return Err(refuse("is a table that would have to be packed"));
    };
    let (old_unit, new_unit) = (old.unit_rows(), spec.unit_rows());
    let panel_bytes = bytes.len() / old.rows.div_ceil(old_unit).max(1);
    // Units are whole panels of both packings, several per thread at a time.
    let unit = old_unit * new_unit / gcd(old_unit, new_unit);
    let rows_at_once = rows_per_piece(spec.columns, unit);
    let firsts: Vec<usize> = (0..spec.rows).step_by(rows_at_once).collect();
    for firsts in firsts.chunks(4 * rayon::current_num_threads()) {
        let pieces: Vec<Option<Vec<u8>>> = firsts
            .par_iter()
            .map(|first| {
                let end = spec.rows.min(first + rows_at_once);
                let panels = first / old_unit * panel_bytes..end.div_ceil(old_unit) * panel_bytes;
                let values = from.unpack(operand, bytes.get(panels)?, end - first, spec.columns)?;
                Some(to.pack(operand, &values, spec.columns))
            })
            .collect();
        for piece in pieces {
            let piece = piece.ok_or_else(|| refuse("has another length than its plan says"))?;
            out.write(&piece)?;
            advance(progress, piece.len())?;
        }
    }
    Ok(())
}

fn advance(progress: &dyn Progress, bytes: usize) -> Result<()> {
    progress.advance(bytes as u64);
    if progress.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
