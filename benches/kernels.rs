//! Measures the linear kernels on one thread, each on each instruction set that this machine has:
//!
//! ```sh
//! cargo bench --bench kernels              # all of them
//! cargo bench --bench kernels -- int8 avx2 # those whose lines have both words
//! ```
//!
//! Prints multiply-adds and weight bytes per clock cycle, from the fastest of many short runs, so that other load on the
//! machine hardly matters. The weight fits the L3 cache: what is measured is the kernel, not memory. Cycles are those of a
//! chain of dependent additions, one each.

use std::hint::black_box;
use std::time::{Duration, Instant};

use aotron::backend::cpu::kernels::RowsRef;
use aotron::backend::cpu::kernels::linear::{
    Activations, Epilogue, LinearShape, Operand, PackedWeight, Packing, linear,
};
use aotron::backend::cpu::kernels::rowwise::RowsMut;
use aotron::isa::Isa;
use aotron::tensor::DType;
use half::bf16;

const OUTPUTS: usize = 512;
const INPUTS: usize = 2048;
/// Of scales in groups.
const GROUP: usize = 128;
const ROWS: [usize; 7] = [1, 2, 4, 6, 8, 16, 192];
/// Time to spend on each figure.
const PATIENCE: Duration = Duration::from_millis(150);

fn main() -> Result<(), aotron::Error> {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let hertz = cycles_per_second();
    println!("{:.2} GHz; multiply-adds per cycle, and bytes of weights per cycle, by rows", hertz / 1e9);
    let header: Vec<String> = ROWS.iter().map(|rows| format!("{rows:>14}")).collect();
    println!("{:<40}{}", "kernel, inputs, instructions", header.concat());
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    for packing in Packing::all() {
        for dtype in packing.activation_dtypes() {
            for isa in Isa::available() {
                let name = format!("{}, {dtype}, {isa}", packing.name());
                if words.iter().all(|word| name.contains(word.as_str())) {
                    let figures: Result<Vec<String>, _> = ROWS
                        .iter()
                        .map(|rows| pool.install(|| measure(packing, *dtype, isa, *rows)))
                        .map(|figure| figure.map(|(seconds, bytes)| (seconds * hertz, bytes)))
                        .zip(ROWS)
                        .map(|(figure, rows)| {
                            let (cycles, bytes) = figure?;
                            let products = (rows * OUTPUTS * INPUTS) as f64;
                            Ok::<_, aotron::Error>(format!("{:>8.1} {:>5.1}", products / cycles, bytes as f64 / cycles))
                        })
                        .collect();
                    println!("{name:<40}{}", figures?.concat());
                }
            }
        }
    }
    Ok(())
}

/// Seconds of the fastest run, and the bytes of the weight.
fn measure(packing: Packing, dtype: DType, isa: Isa, rows: usize) -> Result<(f64, usize), aotron::Error> {
    let group = if packing.weight_dtype() == DType::I4 { GROUP } else { INPUTS };
    let shape = LinearShape { outputs: OUTPUTS, inputs: INPUTS, group };
    let most = if packing.weight_dtype() == DType::I4 { 7 } else { 100 };
    let codes: Vec<f32> = (0..OUTPUTS * INPUTS).map(|i| ((i * 37) % (2 * most + 1)) as f32 - most as f32).collect();
    let weight = packing.pack(Operand::Weight, &codes, INPUTS);
    let scales = match packing.has_scales() {
        true => packing.pack(Operand::Scales, &vec![0.01; OUTPUTS * INPUTS / group], INPUTS / group),
        false => Vec::new(),
    };
    let weight = PackedWeight::new(packing, &weight, &scales, shape)?;
    let floats: Vec<f32> = (0..rows * INPUTS).map(|i| ((i * 29) % 201) as f32 - 100.0).collect();
    let halves: Vec<bf16> = floats.iter().map(|x| bf16::from_f32(*x)).collect();
    let bytes: Vec<i8> = floats.iter().map(|x| *x as i8).collect();
    let row_scales = vec![0.1; rows];
    let x = match dtype {
        DType::F32 => Activations::F32(RowsRef::new(&floats, INPUTS, INPUTS)),
        DType::BF16 => Activations::Bf16(RowsRef::new(&halves, INPUTS, INPUTS)),
        _ => Activations::I8 { codes: RowsRef::new(&bytes, INPUTS, INPUTS), scales: RowsRef::new(&row_scales, 1, 1) },
    };
    let mut out = vec![0f32; rows * OUTPUTS];
    let mut best = f64::INFINITY;
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        let started = Instant::now();
        linear(isa, x, weight, Epilogue::Store, RowsMut { data: black_box(&mut out), stride: OUTPUTS, rows })?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok((
        best,
        packing.stored(Operand::Weight, OUTPUTS, INPUTS).1.iter().product::<usize>() * packing.weight_dtype().bytes(),
    ))
}

/// Of this core, by a chain of additions, each of which takes the result of the one before it.
fn cycles_per_second() -> f64 {
    const CHAIN: u64 = 400_000;
    let mut best = f64::INFINITY;
    for _ in 0..200 {
        let started = Instant::now();
        let mut sum = black_box(1u64);
        for _ in 0..CHAIN / 8 {
            // Eight that the compiler cannot fold into fewer.
            for _ in 0..8 {
                sum = black_box_register(sum.wrapping_add(1));
            }
        }
        black_box(sum);
        best = best.min(started.elapsed().as_secs_f64());
    }
    CHAIN as f64 / best
}

/// The value, which the compiler cannot know anything of, in a register.
#[inline(always)]
#[allow(unsafe_code)]
fn black_box_register(mut value: u64) -> u64 {
    // SAFETY: no instruction at all.
    unsafe { std::arch::asm!("/* {0} */", inout(reg) value, options(pure, nomem, nostack, preserves_flags)) };
    value
}
