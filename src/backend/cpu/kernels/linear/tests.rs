use super::*;
use crate::backend::cpu::kernels::rowwise;
use crate::quantize::Scheme;

fn random(seed: &mut u32) -> f32 {
    *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    (*seed >> 8) as f32 / (1 << 23) as f32 - 1.0
}

/// A weight packed for a kernel, and the numbers that it stands for.
struct PackedCase {
    packing: Packing,
    weight: Vec<u8>,
    scales: Vec<u8>,
    shape: LinearShape,
    values: Vec<f32>, // [outputs, inputs]
}

impl PackedCase {
    fn new(packing: Packing, weight: &[f32], outputs: usize, inputs: usize) -> PackedCase {
        let scheme = match packing.weight_dtype() {
            DType::I8 => Scheme::INT8,
            DType::I4 => Scheme::INT4,
            DType::F8 => Scheme::FP8,
            dtype => {
                let round = |w: &f32| if dtype == DType::BF16 { bf16::from_f32(*w).to_f32() } else { *w };
                let values: Vec<f32> = weight.iter().map(round).collect();
                let packed = packing.pack(Operand::Weight, &values, inputs);
                let shape = LinearShape { outputs, inputs, group: inputs };
                return PackedCase { packing, weight: packed, scales: Vec::new(), shape, values };
            }
        };
        let (groups, group) = (scheme.blocks(inputs), scheme.block().unwrap_or(inputs));
        let (mut codes, mut scales) = (weight.to_vec(), vec![0.0; outputs * groups]);
        scheme.quantize(inputs, &mut codes, &mut scales);
        let value = |(i, code): (usize, &f32)| code * scales[i / inputs * groups + i % inputs / group];
        let values = codes.iter().enumerate().map(value).collect();
        let shape = LinearShape { outputs, inputs, group };
        let packed = packing.pack(Operand::Weight, &codes, inputs);
        PackedCase { packing, weight: packed, scales: packing.pack(Operand::Scales, &scales, groups), shape, values }
    }

    fn view(&self) -> PackedWeight<'_> {
        PackedWeight::new(self.packing, &self.weight, &self.scales, self.shape).unwrap()
    }
}

/// Rows of activations in one of the types that a kernel takes, and the numbers that they stand for.
struct InputCase {
    dtype: DType,
    f32: Vec<f32>,
    bf16: Vec<bf16>,
    codes: Vec<i8>,
    scales: Vec<f32>,
    values: Vec<f32>, // [rows, stride]
    stride: usize,
    inputs: usize,
}

impl InputCase {
    fn new(dtype: DType, x: Vec<f32>, stride: usize, inputs: usize) -> InputCase {
        let rows = x.len() / stride;
        let bf16: Vec<bf16> = x.iter().map(|x| bf16::from_f32(*x)).collect();
        let (mut codes, mut scales) = (vec![0; x.len()], vec![0.0; rows]);
        let out = RowsMut { data: &mut codes, stride, rows };
        rowwise::quantize(
            Isa::detect(),
            RowsRef::new(&x, stride, inputs),
            None,
            out,
            RowsMut { data: &mut scales, stride: 1, rows },
        );
        let values = match dtype {
            DType::F32 => x.clone(),
            DType::BF16 => bf16.iter().map(|x| x.to_f32()).collect(),
            _ => codes.iter().enumerate().map(|(i, code)| f32::from(*code) * scales[i / stride]).collect(),
        };
        InputCase { dtype, f32: x, bf16, codes, scales, values, stride, inputs }
    }

    fn rows_from(&self, row: usize) -> Activations<'_> {
        let at = row * self.stride;
        match self.dtype {
            DType::F32 => Activations::F32(RowsRef::new(&self.f32[at..], self.stride, self.inputs)),
            DType::BF16 => Activations::Bf16(RowsRef::new(&self.bf16[at..], self.stride, self.inputs)),
            _ => Activations::I8 {
                codes: RowsRef::new(&self.codes[at..], self.stride, self.inputs),
                scales: RowsRef::new(&self.scales[row..], 1, 1),
            },
        }
    }
}

/// Every kernel with every type of activations it takes.
fn cases() -> impl Iterator<Item = (Packing, DType)> {
    Packing::all().flat_map(|packing| packing.activation_dtypes().iter().map(move |dtype| (packing, *dtype)))
}

fn run<O: FloatElement>(
    isa: Isa,
    x: Activations<'_>,
    weight: &PackedCase,
    epilogue: Epilogue,
    out: &mut [O],
    stride: usize,
) {
    let rows = out.len() / stride;
    linear(isa, x, weight.view(), epilogue, RowsMut { data: out, stride, rows }).unwrap();
}

/// Against sums in f64 of the numbers that codes stand for, on poisoned outputs, for every kernel and instruction set, at
/// odd sizes; and no row depends on those beside it.
#[test]
fn layers_are_sums_in_f64_and_rows_do_not_depend_on_their_batch() {
    for (packing, dtype) in cases() {
        let mut seed = 7;
        for (rows, inputs, outputs) in
            [(1, 1, 1), (1, 33, 65), (3, 33, 65), (5, 64, 64), (7, 130, 130), (97, 48, 3), (200, 5, 70), (13, 4101, 66)]
        {
            let (x_stride, out_stride) = (inputs + 3, outputs + 5);
            let x = InputCase::new(dtype, (0..rows * x_stride).map(|_| random(&mut seed)).collect(), x_stride, inputs);
            let weight: Vec<f32> = (0..outputs * inputs).map(|_| random(&mut seed)).collect();
            let weight = PackedCase::new(packing, &weight, outputs, inputs);
            for isa in Isa::available() {
                let name = format!("{packing:?} {dtype} {isa} {rows}x{inputs}x{outputs}");
                let mut out = vec![f32::NAN; rows * out_stride];
                run(isa, x.rows_from(0), &weight, Epilogue::Store, &mut out, out_stride);
                let mut alone = vec![f32::NAN; outputs];
                for row in 0..rows {
                    for n in 0..outputs {
                        let term =
                            |k| f64::from(x.values[row * x_stride + k]) * f64::from(weight.values[n * inputs + k]);
                        let (sum, size) = (0..inputs).map(term).fold((0.0, 0.0), |(s, a), t| (s + t, a + t.abs()));
                        let error = (f64::from(out[row * out_stride + n]) - sum).abs();
                        assert!(error <= 1e-5 * size, "{name} [{row}, {n}]: {error}");
                    }
                    assert!(out[row * out_stride + outputs..][..5].iter().all(|v| v.is_nan()), "{name}: past a row");
                    run(isa, x.rows_from(row), &weight, Epilogue::Store, &mut alone, outputs);
                    assert_eq!(alone, out[row * out_stride..][..outputs], "{name}: a row depends on its batch");
                }
            }
        }
    }
}

/// Integers are summed exactly, so a package may be packed for one CPU and run on another.
#[test]
fn packings_of_8_bit_products_give_the_same_bits_on_every_cpu() {
    let (rows, inputs, outputs) = (9, 517, 70);
    let mut seed = 3;
    let x = InputCase::new(DType::I8, (0..rows * inputs).map(|_| random(&mut seed)).collect(), inputs, inputs);
    let weight: Vec<f32> = (0..outputs * inputs).map(|_| random(&mut seed)).collect();
    let mut all = Vec::new();
    for packing in Packing::all() {
        if packing.weight_dtype() != DType::I8 || !packing.activation_dtypes().contains(&DType::I8) {
            continue;
        }
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; rows * outputs];
            run(
                isa,
                x.rows_from(0),
                &PackedCase::new(packing, &weight, outputs, inputs),
                Epilogue::Store,
                &mut out,
                outputs,
            );
            all.push((packing, isa, out));
        }
    }
    assert!(all.len() > 1);
    for (packing, isa, out) in &all {
        assert_eq!(*out, all[0].2, "{packing:?} on {isa}");
    }
}

#[test]
fn epilogues() {
    for (packing, dtype) in cases() {
        let weight = PackedCase::new(packing, &[1.0, -1.0], 2, 1);
        let near = |got: [f32; 2], expected: [f32; 2]| {
            got.iter().zip(expected).all(|(got, expected)| (got - expected).abs() <= 0.02 * expected.abs())
        };
        for isa in Isa::available() {
            let x = InputCase::new(dtype, vec![3.0], 1, 1);
            let mut out = [f32::NAN; 2];
            run(isa, x.rows_from(0), &weight, Epilogue::Relu2, &mut out, 2);
            assert!(near(out, [9.0, 0.0]) && out[1] == 0.0, "{packing:?} {isa}: {out:?}");
            run(isa, x.rows_from(0), &weight, Epilogue::Accumulate, &mut out, 2);
            assert!(near(out, [12.0, -3.0]), "{packing:?} {isa}: {out:?}");
            let mut narrow = [bf16::NAN; 2];
            run(isa, x.rows_from(0), &weight, Epilogue::Relu2, &mut narrow, 2);
            assert!(near(narrow.map(|v| v.to_f32()), [9.0, 0.0]), "{packing:?} {isa}: {narrow:?}");
        }
    }
}

#[test]
fn a_nan_is_not_swallowed() {
    for (packing, dtype) in cases() {
        let weight = PackedCase::new(packing, &[1.0, -1.0], 1, 2);
        for isa in Isa::available() {
            let x = InputCase::new(dtype, vec![f32::NAN, 2.0], 2, 2);
            let mut out = [0.0f32];
            run(isa, x.rows_from(0), &weight, Epilogue::Relu2, &mut out, 1);
            assert!(out[0].is_nan(), "{packing:?} {dtype} {isa}");
        }
    }
}

#[test]
fn what_is_packed_can_be_unpacked() {
    let (outputs, mut seed) = (70, 5);
    for packing in Packing::all() {
        for inputs in [1, 7, 300] {
            let weight: Vec<f32> = (0..outputs * inputs).map(|_| random(&mut seed)).collect();
            let scheme = match packing.weight_dtype() {
                DType::I8 => Some(Scheme::INT8),
                DType::I4 => Some(Scheme::INT4),
                DType::F8 => Some(Scheme::FP8),
                _ => None,
            };
            let mut values = weight.clone();
            if let Some(scheme) = scheme {
                let mut scales = vec![0.0; outputs * scheme.blocks(inputs)];
                scheme.quantize(inputs, &mut values, &mut scales);
                let packed = packing.pack(Operand::Scales, &scales, scheme.blocks(inputs));
                let unpacked = packing.unpack(Operand::Scales, &packed, outputs, scheme.blocks(inputs)).unwrap();
                assert_eq!(unpacked, scales, "{packing:?}");
            } else if packing.weight_dtype() == DType::BF16 {
                values.iter_mut().for_each(|w| *w = bf16::from_f32(*w).to_f32());
            }
            let packed = packing.pack(Operand::Weight, &values, inputs);
            assert_eq!(
                packing.unpack(Operand::Weight, &packed, outputs, inputs).unwrap(),
                values,
                "{packing:?} {inputs}"
            );
        }
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let codes = |dtype| choose(dtype, DType::F32, CpuFeatures::PORTABLE).unwrap();
    let shape = |inputs, group| LinearShape { outputs: 64, inputs, group };
    let fits = |dtype, weight: usize, scales: usize, shape| {
        PackedWeight::new(codes(dtype), &vec![0; weight * 64], &vec![0; scales * 256], shape).is_ok()
    };
    assert!(fits(DType::I8, 6, 2, shape(6, 3)));
    assert!(!fits(DType::I8, 6, 2, shape(6, 6)), "too many scales");
    assert!(!fits(DType::I8, 6, 2, shape(6, 0)));
    assert!(!fits(DType::I8, 6, 2, LinearShape { outputs: 65, ..shape(6, 3) }));
    assert!(!fits(DType::I4, 3, 2, shape(6, 3)), "a byte with two scales");
    assert!(fits(DType::I4, 3, 2, shape(6, 4)));

    let weight = PackedCase::new(choose(DType::F32, DType::F32, CpuFeatures::PORTABLE).unwrap(), &[1.0; 4], 2, 2);
    let x = [1.0f32; 8];
    let refused = |rows: usize, stride: usize, x_stride: usize, width: usize| {
        let mut out = [0.0f32; 8];
        let x = Activations::F32(RowsRef::new(&x, x_stride, width));
        let out = RowsMut { data: &mut out, stride, rows };
        let error = linear(Isa::detect(), x, weight.view(), Epilogue::Store, out);
        matches!(error, Err(Error::Internal { .. }))
    };
    assert!(!refused(4, 2, 2, 2));
    assert!(refused(5, 2, 2, 2), "more rows than there are");
    assert!(refused(4, 1, 2, 2), "rows that overlap");
    assert!(refused(4, 2, 4, 2), "x has too few rows");
    assert!(refused(4, 2, 2, 1), "another width");
    assert!(refused(3, usize::MAX / 2 + 1, 2, 2), "sizes that wrap");
    let bf16 = [bf16::ONE; 8];
    let x = Activations::Bf16(RowsRef::new(&bf16, 2, 2));
    let out = RowsMut { data: &mut [0.0f32; 8], stride: 2, rows: 4 };
    let error = linear(Isa::detect(), x, weight.view(), Epilogue::Store, out).unwrap_err().to_string();
    assert!(error.contains("activations in bf16 for f32"), "{error}");
}

#[test]
fn a_cpu_gets_the_packing_it_is_best_with_and_names_are_unique() {
    let chosen = |x, features| choose(DType::I8, x, features).unwrap().name();
    let vnni = CpuFeatures::by_name("avx512-vnni").unwrap();
    assert_eq!(chosen(DType::I8, vnni), "int8-quads-vnni");
    assert_eq!(chosen(DType::I8, CpuFeatures::AVX2), "int8-quads");
    assert_eq!(chosen(DType::BF16, vnni), "i8-codes");
    assert_eq!(choose(DType::F32, DType::BF16, vnni), None);
    for packing in Packing::all() {
        assert_eq!(Packing::by_name(packing.name()).unwrap().weight_dtype(), packing.weight_dtype());
        assert!(packing.tile_size().mr * packing.tile_size().nr <= FEW_SUMS);
        assert!(packing.tile_size().mc * packing.tile_size().nr <= MAX_SUMS);
        let json = serde_json::to_string(&packing).unwrap();
        assert_eq!(serde_json::from_str::<Packing>(&json).unwrap(), packing);
    }
    assert_eq!(
        Packing::all().map(|p| p.name()).collect::<std::collections::HashSet<_>>().len(),
        Packing::all().count()
    );
    let error = serde_json::from_str::<Packing>("\"amx-tiles\"").unwrap_err().to_string();
    assert!(error.contains("`amx-tiles`") && error.contains("--finish --recipe cpu"), "{error}");
}
