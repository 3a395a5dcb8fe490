use std::ops::Range;

use proptest::prelude::*;

use super::super::sharded::{Shard, ShardedTensor};
use super::*;
use crate::checkpoint::torch::ElementType;

fn file_of(values: &[f32]) -> (tempfile::NamedTempFile, [MappedFile; 1]) {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    // SAFETY: nothing changes the test's own file.
    #[allow(unsafe_code)]
    let files = [unsafe { MappedFile::open(file.path()) }.unwrap()];
    (file, files)
}

/// A shard of these rows and columns, stored densely from element `at` of file 0.
fn shard(rows: Range<usize>, columns: Range<usize>, at: usize) -> Shard {
    let shape = vec![rows.len(), columns.len()];
    let strides = vec![columns.len(), 1];
    Shard { origin: vec![rows.start, columns.start], shape, strides, file: 0, start: 4 * at }
}

fn tensor(shape: &[usize], shards: Vec<Shard>) -> ShardedTensor {
    ShardedTensor { dtype: ElementType::Float32, shape: shape.to_vec(), shards }
}

fn weight(tensor: &ShardedTensor, files: &[MappedFile]) -> Result<Weight, String> {
    Weight::new("w".into(), DType::F32, tensor, files)
}

fn view<'a>(weight: &'a Weight, files: &'a [MappedFile]) -> TensorView<'a> {
    TensorView { name: "w", dtype: DType::F32, shape: &weight.shape, weight, files }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Any grid of shards, in any order and either layout, reads as the matrix it was cut from, whichever range is read.
    #[test]
    fn reads_any_grid(
        heights in prop::collection::vec(1usize..5, 1..4),
        widths in prop::collection::vec(1usize..5, 1..4),
        transposed in any::<bool>(),
        seed in any::<u64>(),
        ends in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
    ) {
        let (rows, columns) = (heights.iter().sum::<usize>(), widths.iter().sum::<usize>());
        let matrix: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
        let (mut stored, mut shards) = (Vec::new(), Vec::new());
        let mut top = 0;
        for height in &heights {
            let mut left = 0;
            for width in &widths {
                let mut shard = shard(top..top + height, left..left + width, stored.len());
                let at = |row: usize, column: usize| matrix[(top + row) * columns + left + column];
                if transposed {
                    shard.strides = vec![1, *height];
                    stored.extend((0..height * width).map(|i| at(i % height, i / height)));
                } else {
                    stored.extend((0..height * width).map(|i| at(i / width, i % width)));
                }
                shards.push(shard);
                left += width;
            }
            top += height;
        }
        let turn = seed as usize % shards.len();
        shards.rotate_left(turn);
        let (_file, files) = file_of(&stored);
        let weight = weight(&tensor(&[rows, columns], shards), &files).unwrap();
        let view = view(&weight, &files);
        let (one, other) = (ends.0.index(matrix.len() + 1), ends.1.index(matrix.len() + 1));
        let range = one.min(other)..one.max(other);
        let mut out = vec![f32::NAN; range.len()];
        view.read_f32(range.start, &mut out);
        prop_assert_eq!(&out[..], &matrix[range.clone()]);
        let raw: Vec<u8> = out.iter().flat_map(|value| value.to_le_bytes()).collect();
        prop_assert_eq!(&view.raw(range)[..], &raw[..]);
    }

    /// Cutting rows out and joining them again changes nothing; nor does stacking.
    #[test]
    fn cuts_and_joins(rows in 2usize..9, columns in 1usize..5, cut in any::<prop::sample::Index>(), layers in 1usize..4) {
        let cut = cut.index(rows + 1);
        let values: Vec<f32> = (0..layers * rows * columns).map(|i| i as f32).collect();
        let (_file, files) = file_of(&values);
        let strides = vec![rows * columns, columns, 1];
        let all = Shard { origin: vec![0; 3], shape: vec![layers, rows, columns], strides, file: 0, start: 0 };
        let stacked = tensor(&[layers, rows, columns], vec![all]);
        for layer in 0..layers {
            let matrix = stacked.at(layer).unwrap();
            let parts = vec![matrix.rows(cut..rows).unwrap(), matrix.rows(0..cut).unwrap()];
            let joined = ShardedTensor::concat(parts, 0).unwrap();
            let weight = weight(&joined, &files).unwrap();
            let mut out = vec![f32::NAN; rows * columns];
            view(&weight, &files).read_f32(0, &mut out);
            let of_layer = &values[layer * rows * columns..(layer + 1) * rows * columns];
            out.rotate_right(cut * columns);
            prop_assert_eq!(&out[..], of_layer);
        }
        prop_assert!(stacked.at(layers).is_err());
        prop_assert!(stacked.rows(1..layers + 1).is_err());
    }
}

#[test]
fn a_vector_is_one_row() {
    let (_file, files) = file_of(&[5.0, 6.0, 1.0, 2.0, 3.0]);
    let part = |origin: usize, size: usize, at: usize| Shard {
        origin: vec![origin],
        shape: vec![size],
        strides: vec![1],
        file: 0,
        start: 4 * at,
    };
    let weight = weight(&tensor(&[5], vec![part(3, 2, 0), part(0, 3, 2)]), &files).unwrap();
    let mut out = [f32::NAN; 5];
    view(&weight, &files).read_f32(0, &mut out);
    assert_eq!(out, [1.0, 2.0, 3.0, 5.0, 6.0]);
}

#[test]
fn refuses_shards_that_make_no_matrix() {
    let (_file, files) = file_of(&[0.0; 12]);
    let refused = |tensor: ShardedTensor, reason: &str| {
        let error = weight(&tensor, &files).unwrap_err();
        assert!(error.starts_with("`w`: ") && error.contains(reason), "{error}\nexpected: {reason}");
    };
    let both = |one: Shard, other: Shard| tensor(&[4, 3], vec![one, other]);
    refused(tensor(&[4, 3], vec![]), "no shard contains the element at row 0, column 0");
    refused(tensor(&[4, 3], vec![shard(0..3, 0..3, 0)]), "no shard contains the element at row 3, column 0");
    refused(both(shard(0..4, 0..2, 0), shard(1..4, 2..3, 8)), "no shard contains the element at row 0, column 2");
    refused(both(shard(0..4, 0..2, 0), shard(0..4, 1..3, 0)), "two shards contain the element at row 0, column 1");
    refused(both(shard(0..3, 0..3, 0), shard(2..4, 0..3, 0)), "two shards contain the element at row 2, column 0");
    refused(both(shard(0..3, 0..3, 0), shard(3..5, 0..3, 0)), "lies outside the tensor's shape [4, 3]");
    refused(both(shard(0..3, 0..3, 0), shard(3..4, 0..3, 10)), "outside their file of 48 bytes");
    refused(tensor(&[4, 3, 1], vec![]), "3 axes, expected 1 or 2");
    refused(tensor(&[], vec![]), "0 axes");
    let strided =
        |strides: [usize; 2]| tensor(&[4, 3], vec![Shard { strides: strides.to_vec(), ..shard(0..4, 0..3, 0) }]);
    refused(strided([0, 1]), "repeat elements");
    refused(strided([3, usize::MAX]), "repeat elements or overflow");
    refused(strided([usize::MAX / 4, 1]), "outside their file");
    let mut short = shard(0..4, 0..3, 0);
    short.strides.pop();
    refused(tensor(&[4, 3], vec![short]), "lies outside the tensor's shape");
    let mut elsewhere = shard(0..4, 0..3, 0);
    elsewhere.file = 1;
    refused(tensor(&[4, 3], vec![elsewhere]), "outside their file of 0 bytes");
    let single = |row: usize| shard(row..row + 1, 0..3, 0);
    let many = (0..70_000).map(single).collect();
    refused(tensor(&[70_000, 3], many), "more than 65536 blocks");
    let error = ShardedTensor::concat(vec![tensor(&[2, 3], vec![]), tensor(&[2, 4], vec![])], 0).unwrap_err();
    assert!(error.contains("rank 1 has float32 [2, 4], which cannot be concatenated with float32 [2, 3]"), "{error}");
}
