use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::graph::{Const, Dim, Type};
use crate::quantize::Scheme;
use crate::tensor::DType;

const COLUMNS: usize = 192;

fn checkpoint() -> Checkpoint {
    Checkpoint::open(Path::new("tests/data/tiny-chat")).unwrap()
}

fn tensor(name: &str) -> Const {
    Const::Tensor(name.into())
}

fn plain(expr: &Const, rows: usize, width: usize) -> ConstRows {
    ConstRows::new(expr, &Type::new(DType::F32, [Dim::fixed(rows), Dim::fixed(width)])).unwrap()
}

/// An item that stores rows as FP32, codes as numbers.
fn item<'p>(name: &'p str, content: &'p ConstRows) -> PackItem<'p> {
    let store = |rows: &[f32]| Ok(rows.iter().flat_map(|value| value.to_le_bytes()).collect());
    let stored = (Dtype::F32, vec![content.rows(), content.width()]);
    PackItem { name, stored, content, unit: 1, store: Box::new(store), finish: None }
}

/// Bytes of the files, digests of the tensors, and the number of bytes read.
type PackedFiles = (Vec<Vec<u8>>, Vec<[u8; 32]>, u64);

/// Packs files of these items.
fn packed(files: Vec<Vec<PackItem<'_>>>, digest: bool) -> Result<PackedFiles> {
    let mut out: Vec<Vec<u8>> = files.iter().map(|_| Vec::new()).collect();
    let mut sinks: Vec<_> = out
        .iter_mut()
        .map(|out| {
            move |bytes: &[u8]| {
                out.extend_from_slice(bytes);
                Ok(())
            }
        })
        .collect();
    let files = files.into_iter().zip(&mut sinks).map(|(items, sink)| File { items, sink }).collect();
    let read = AtomicU64::new(0);
    let follow = |bytes| {
        read.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    };
    let digests = pack(files, &checkpoint(), digest, &follow)?;
    drop(sinks);
    Ok((out, digests, read.into_inner()))
}

/// The matrices of two layers: name, expression, and flattened form.
fn matrices() -> Vec<(String, Const, ConstRows)> {
    let mut all = Vec::new();
    for layer in 0..2 {
        let part = |name: &str| tensor(&format!("model.layers.{layer}.{name}.weight"));
        let qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].map(part).to_vec();
        let mut add = |name: &str, expr: Const, rows: usize, columns: usize| {
            let content = plain(&expr, rows, columns);
            all.push((format!("{name}{layer}"), expr, content));
        };
        add("qkv", Const::ConcatRows(qkv), 3 * COLUMNS, COLUMNS);
        add("up", part("mlp.up_proj"), 4 * COLUMNS, COLUMNS);
        add("norm", part("input_layernorm"), 1, COLUMNS);
        add("down", part("mlp.down_proj"), COLUMNS, 4 * COLUMNS);
    }
    all
}

#[test]
fn files_packed_together_are_those_packed_alone() {
    let matrices = matrices();
    let schemes = [Scheme::INT8, Scheme::INT4];
    let quantized: Vec<Vec<(ConstRows, ConstRows)>> = schemes
        .iter()
        .map(|scheme| {
            let of = |(_, expr, content): &(String, Const, ConstRows)| {
                let (rows, columns) = (content.rows(), content.columns());
                let matrix = Box::new(expr.clone());
                let scales = Const::Scales { matrix: matrix.clone(), scheme: *scheme, columns };
                let codes = plain(&Const::Codes(matrix, *scheme), rows, columns);
                (codes, plain(&scales, rows, scheme.blocks(columns)))
            };
            matrices.iter().map(of).collect()
        })
        .collect();
    let values = || matrices.iter().map(|(name, _, content)| item(name, content)).collect();
    // Codes first and all scales after them; or each scale right after its codes; or scales first.
    let codes = |scheme: usize, order: &'static str| {
        let all = matrices.iter().zip(&quantized[scheme]).filter(|((name, ..), _)| !name.starts_with("norm"));
        let mut items = Vec::new();
        let mut behind = Vec::new();
        for ((name, ..), (codes, scales)) in all {
            let (codes, scales) = (item(name, codes), item(name, scales));
            match order {
                "behind" => (items.push(codes), behind.push(scales)),
                "next" => (items.push(codes), items.push(scales)),
                _ => (items.push(scales), items.push(codes)),
            };
        }
        items.append(&mut behind);
        items
    };
    let reversed = || {
        let mut items: Vec<PackItem<'_>> = values();
        items.reverse();
        items
    };
    let files =
        || vec![values(), codes(0, "behind"), codes(0, "next"), codes(1, "behind"), codes(1, "before"), reversed()];
    let (together, ..) = packed(files(), true).unwrap();
    for (index, file) in files().into_iter().enumerate() {
        let (alone, ..) = packed(vec![file], false).unwrap();
        assert!(alone[0] == together[index], "file {index}");
    }
}

#[test]
fn every_weight_is_read_once_and_digested() {
    let checkpoint = checkpoint();
    let all: Vec<(String, ConstRows)> = checkpoint
        .tensors()
        .map(|view| {
            let columns = *view.shape.last().unwrap();
            (view.name.to_owned(), plain(&tensor(view.name), view.elements() / columns, columns))
        })
        .collect();
    let file = || all.iter().map(|(name, content)| item(name, content)).collect::<Vec<_>>();
    let (files, digests, read) = packed(vec![file(), file(), file()], true).unwrap();
    assert_eq!(read, checkpoint.weight_bytes());
    assert!(files[0] == files[1] && files[1] == files[2]);
    for (view, digest) in checkpoint.tensors().zip(digests) {
        let expected: [u8; 32] = Sha256::digest(view.raw(0..view.elements())).into();
        assert_eq!(digest, expected, "{}", view.name);
    }
}

#[test]
fn a_sink_or_a_follower_ends_it() {
    let matrices = matrices();
    let items = || matrices.iter().map(|(name, _, content)| item(name, content)).collect();
    let mut written = 0;
    let mut full = |bytes: &[u8]| {
        written += bytes.len();
        if written > 1 << 20 { Err(Error::Cancelled) } else { Ok(()) }
    };
    let file = File { items: items(), sink: &mut full };
    assert!(matches!(pack(vec![file], &checkpoint(), true, &|_| Ok(())), Err(Error::Cancelled)));
    let mut sink = |_: &[u8]| Ok(());
    let file = File { items: items(), sink: &mut sink };
    let follow = |bytes| if bytes > 0 { Err(Error::Cancelled) } else { Ok(()) };
    assert!(matches!(pack(vec![file], &checkpoint(), true, &follow), Err(Error::Cancelled)));
}

#[test]
fn memory_is_predicted_from_what_is_held() {
    let matrix = Box::new(tensor("w"));
    let codes = plain(&Const::Codes(matrix.clone(), Scheme::INT8), 4096, 16384);
    let scales = plain(&Const::Scales { matrix, scheme: Scheme::INT8, columns: 16384 }, 4096, 1);
    let mut transposed = item("codes", &codes);
    transposed.finish = Some(Box::new(|_, _| Ok(())));
    let (held, kept) = (4096 * 16384 * 9 / 8, 4 * 4096);
    let alone = memory_bytes([&[transposed, item("scales", &scales)][..]].into_iter());
    assert!(alone > held + kept && alone < held + kept + (1 << 30), "{alone}");
    assert_eq!(memory_bytes(std::iter::empty()), 0);
}

#[test]
fn one_matrix_in_two_shapes_is_an_internal_error() {
    let up = tensor("model.layers.0.mlp.up_proj.weight");
    let (whole, half) = (plain(&up, 4 * COLUMNS, COLUMNS), plain(&up, 8 * COLUMNS, COLUMNS / 2));
    let error = packed(vec![vec![item("whole", &whole)], vec![item("half", &half)]], false).unwrap_err();
    assert!(matches!(error, Error::Internal { .. }) && error.to_string().contains("up_proj"), "{error}");
}
