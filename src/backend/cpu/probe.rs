//! Probes of what limits the kernels on this machine at this moment: the bytes per second that its threads read from
//! memory together, and the operations per second of their multiply units. A measurement of decoding or of prefill is a
//! fraction of a probe taken beside it, which is comparable between machines, and between minutes of a shared one.
#![allow(unsafe_code)]

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use memmap2::{Advice, MmapMut};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, Result};
use crate::isa::{Isa, dispatch};
use crate::memory::available_memory_bytes;
use crate::tensor::DType;

/// Size of the buffer that is read: far larger than any cache.
const BUFFER_BYTES: u64 = 1 << 30;
/// The least that is worth reading if memory is short.
const LEAST_BUFFER_BYTES: u64 = 1 << 20;
/// Bytes that a thread reads before it takes the next ones.
const PART_BYTES: usize = 1 << 20;
/// Time of a read probe.
const READ_TIME: Duration = Duration::from_millis(70);
/// Time of a multiply probe.
const MULTIPLY_TIME: Duration = Duration::from_millis(40);
/// Instructions per accumulator between looks at the clock: some 30 microseconds.
const ROUNDS: usize = 1 << 13;

/// Threads of its own and a buffer, for repeated measurements.
pub struct Probe {
    pool: ThreadPool,
    isa: Isa,
    buffer: MmapMut,
}

/// Operations per second of the multiply units.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MultiplyRate {
    /// The instruction that was timed: `vpdpbusd`, `vdpbf16ps`, `vpmaddubsw`, `vfmadd231ps`.
    pub unit: &'static str,
    /// Multiplications and additions per second, two for each multiply-add.
    pub flops_per_second: f64,
}

impl Probe {
    /// Starts `threads` threads, at least one, and fills a buffer of 1 GiB, or of a quarter of the available memory if
    /// that is less, in huge pages where the system has them.
    ///
    /// # Errors
    /// [`Error::Request`] if the threads cannot be started or the memory cannot be reserved.
    pub fn new(threads: usize, isa: Isa) -> Result<Probe> {
        let bytes = BUFFER_BYTES.min(available_memory_bytes().unwrap_or(BUFFER_BYTES) / 4).max(LEAST_BUFFER_BYTES);
        Probe::with_buffer(threads, isa, bytes as usize)
    }

    fn with_buffer(threads: usize, isa: Isa, bytes: usize) -> Result<Probe> {
        let pool = ThreadPoolBuilder::new().num_threads(threads.max(1)).build();
        let pool =
            pool.map_err(|e| Error::Request(format!("cannot start {threads} threads to probe this CPU: {e}")))?;
        let bytes = bytes.next_multiple_of(PART_BYTES);
        let mut buffer = MmapMut::map_anon(bytes)
            .map_err(|e| Error::Request(format!("cannot reserve {bytes} bytes to probe the memory: {e}")))?;
        // Systems without huge pages refuse.
        let _ = buffer.advise(Advice::HugePage);
        // Pages that were never written to may all be the same one.
        buffer.fill(1);
        Ok(Probe { pool, isa, buffer })
    }

    /// Bytes per second that all threads read from memory together, in some 70 milliseconds. Buffers that fit the CPU's
    /// caches are read from those.
    pub fn read_bytes_per_second(&self) -> f64 {
        let words: &[u64] = bytemuck::cast_slice(&self.buffer);
        let parts: Vec<&[u64]> = words.chunks(PART_BYTES / size_of::<u64>()).collect();
        let next = AtomicUsize::new(0);
        self.rate(READ_TIME, || {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let part = parts.get(index % parts.len().max(1)).copied().unwrap_or_default();
            black_box(sum(self.isa, part));
            size_of_val(part) as f64
        })
    }

    /// The rate of the instruction that multiplies activations of a type fastest on the probe's instruction set, on all
    /// threads together, with all operands in registers, in some 40 milliseconds. `None` if neither that type nor that
    /// instruction set has vector instructions of its own.
    pub fn multiply_rate(&self, activations: DType) -> Option<MultiplyRate> {
        let multiply = match activations {
            DType::F32 => multiply_f32,
            DType::BF16 => multiply_bf16,
            DType::I8 => multiply_i8,
            _ => return None,
        };
        let unit = multiply(self.isa, 1)?.unit;
        let rate = self.rate(MULTIPLY_TIME, || multiply(self.isa, ROUNDS).map_or(0.0, |done| done.flops as f64));
        Some(MultiplyRate { unit, flops_per_second: rate })
    }

    /// Work per second, all threads together, each repeating `work` for some `time`.
    fn rate(&self, time: Duration, work: impl Fn() -> f64 + Sync) -> f64 {
        let started = Instant::now();
        let done = self.pool.broadcast(|_| {
            let mut done = 0.0;
            while started.elapsed() < time {
                done += work();
            }
            done
        });
        done.iter().sum::<f64>() / started.elapsed().as_secs_f64()
    }
}

dispatch! {
    /// The wrapping sum of `words`.
    fn sum[](words: &[u64]) -> u64 {
        avx512 => x86::sum_512,
        avx2 => x86::sum_256,
        portable => sum_portable,
    }
}

/// Eight sums, which the compiler may keep in vector registers.
fn sum_portable(words: &[u64]) -> u64 {
    let (lines, rest) = words.as_chunks::<8>();
    let mut sums = [0u64; 8];
    for line in lines {
        for (sum, word) in sums.iter_mut().zip(line) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().chain(rest).fold(0, |all, word| all.wrapping_add(*word))
}

/// What a body below has computed.
struct Done {
    unit: &'static str,
    flops: usize,
}

dispatch! {
    /// FP32 multiply-adds.
    fn multiply_f32[](rounds: usize) -> Option<Done> {
        avx512 => x86::fma_512,
        avx2 => x86::fma_256,
        portable => no_vectors,
    }
}

dispatch! {
    /// Products of BF16, summed in FP32; in FP32 altogether where there is no instruction for them.
    fn multiply_bf16[](rounds: usize) -> Option<Done> {
        avx512_bf16 => x86::bf16_dots,
        avx512 => x86::fma_512,
        avx2 => x86::fma_256,
        portable => no_vectors,
    }
}

dispatch! {
    /// Products of bytes, summed in 32-bit integers.
    fn multiply_i8[](rounds: usize) -> Option<Done> {
        avx512_vnni => x86::byte_dots,
        avx2 => x86::byte_products,
        portable => no_vectors,
    }
}

fn no_vectors(_rounds: usize) -> Option<Done> {
    None
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Sums of memory, and chains of one instruction, each on a sum of its own in a register, enough of them to hide its
    //! latency on every unit that a core has. Every function needs the instructions that it names, which the dispatchers above check; loops have
    //! no closure between them and the registers, which would be compiled without those instructions.

    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::Done;

    /// Reads 256 bytes at a time. Intrinsics rather than a loop over an array, in whose place the compiler puts gathers.
    #[inline(always)]
    pub fn sum_512(words: &[u64]) -> u64 {
        let (groups, rest) = words.as_chunks::<32>();
        let mut lanes = [0u64; 8];
        // SAFETY: AVX-512 is present; a group is four vectors long, and `lanes` one.
        unsafe {
            let mut sums = [_mm512_setzero_si512(); 4];
            for group in groups {
                let from = group.as_ptr();
                for (index, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_add_epi64(*sum, _mm512_loadu_si512(from.add(8 * index).cast()));
                }
            }
            let sum = _mm512_add_epi64(_mm512_add_epi64(sums[0], sums[1]), _mm512_add_epi64(sums[2], sums[3]));
            _mm512_storeu_si512(lanes.as_mut_ptr().cast(), sum);
        }
        lanes.iter().chain(rest).fold(0, |all, word| all.wrapping_add(*word))
    }

    #[inline(always)]
    pub fn sum_256(words: &[u64]) -> u64 {
        let (groups, rest) = words.as_chunks::<16>();
        let mut lanes = [0u64; 4];
        // SAFETY: AVX2 is present; a group is four vectors long, and `lanes` one.
        unsafe {
            let mut sums = [_mm256_setzero_si256(); 4];
            for group in groups {
                let from = group.as_ptr();
                for (index, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm256_add_epi64(*sum, _mm256_loadu_si256(from.add(4 * index).cast()));
                }
            }
            let sum = _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3]));
            _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sum);
        }
        lanes.iter().chain(rest).fold(0, |all, word| all.wrapping_add(*word))
    }

    /// Chains with 32 registers, and with 16, of which operands and products take four.
    const SUMS_512: usize = 16;
    const SUMS_256: usize = 12;

    #[inline(always)]
    pub fn fma_512(rounds: usize) -> Option<Done> {
        // SAFETY: AVX-512 is present; there are no pointers.
        unsafe {
            let (x, w) = (_mm512_set1_ps(black_box(1.0)), _mm512_set1_ps(black_box(1e-3)));
            let mut sums = [_mm512_set1_ps(1.0); SUMS_512];
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm512_fmadd_ps(x, w, *sum);
                }
            }
            black_box(sums);
        }
        Some(Done { unit: "vfmadd231ps", flops: rounds * SUMS_512 * 2 * 16 })
    }

    #[inline(always)]
    pub fn fma_256(rounds: usize) -> Option<Done> {
        // SAFETY: AVX2 and FMA are present; there are no pointers.
        unsafe {
            let (x, w) = (_mm256_set1_ps(black_box(1.0)), _mm256_set1_ps(black_box(1e-3)));
            let mut sums = [_mm256_set1_ps(1.0); SUMS_256];
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm256_fmadd_ps(x, w, *sum);
                }
            }
            black_box(sums);
        }
        Some(Done { unit: "vfmadd231ps", flops: rounds * SUMS_256 * 2 * 8 })
    }

    #[inline(always)]
    pub fn bf16_dots(rounds: usize) -> Option<Done> {
        // SAFETY: AVX-512 BF16 is present; vectors of BF16 and of integers are both 64 bytes without invalid values.
        unsafe {
            let x: __m512bh = std::mem::transmute(_mm512_set1_epi32(black_box(0x3f80_3f80))); // 1
            let w: __m512bh = std::mem::transmute(_mm512_set1_epi32(black_box(0x3a83_3a83))); // about 0.001
            let mut sums = [_mm512_set1_ps(1.0); SUMS_512];
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm512_dpbf16_ps(*sum, x, w);
                }
            }
            black_box(sums);
        }
        Some(Done { unit: "vdpbf16ps", flops: rounds * SUMS_512 * 2 * 32 })
    }

    #[inline(always)]
    pub fn byte_dots(rounds: usize) -> Option<Done> {
        // SAFETY: AVX-512 VNNI is present; there are no pointers.
        unsafe {
            let (x, w) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(-5)));
            let mut sums = [_mm512_setzero_si512(); SUMS_512];
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm512_dpbusd_epi32(*sum, x, w);
                }
            }
            black_box(sums);
        }
        Some(Done { unit: "vpdpbusd", flops: rounds * SUMS_512 * 2 * 64 })
    }

    /// `vpmaddubsw`, `vpmaddwd` and `vpaddd`.
    #[inline(always)]
    pub fn byte_products(rounds: usize) -> Option<Done> {
        // SAFETY: AVX2 is present; there are no pointers.
        unsafe {
            let (w, ones) = (_mm256_set1_epi8(black_box(-5)), _mm256_set1_epi16(1));
            let mut sums = [_mm256_set1_epi8(3); SUMS_256];
            for _ in 0..rounds {
                for sum in &mut sums {
                    // The sums are the inputs, so that no product is known before its turn.
                    let pairs = _mm256_maddubs_epi16(*sum, w);
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
                }
            }
            black_box(sums);
        }
        Some(Done { unit: "vpmaddubsw", flops: rounds * SUMS_256 * 2 * 32 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_of_every_instruction_set_return_rates() {
        for isa in Isa::available() {
            let probe = Probe::with_buffer(2, isa, 3 << 20).unwrap();
            let read = probe.read_bytes_per_second();
            assert!(read.is_finite() && read > 0.0, "{isa}: {read}");
            for dtype in [DType::F32, DType::BF16, DType::I8] {
                let rate = probe.multiply_rate(dtype);
                assert_eq!(rate.is_some(), isa.has(crate::isa::CpuFeatures::AVX2), "{isa} {dtype}: {rate:?}");
                if let Some(rate) = rate {
                    let flops = rate.flops_per_second;
                    assert!(flops.is_finite() && flops > 0.0 && rate.unit.starts_with('v'), "{isa} {dtype}: {rate:?}");
                }
            }
            assert_eq!(probe.multiply_rate(DType::F8), None);
        }
    }

    #[test]
    fn every_word_is_summed_on_every_instruction_set() {
        let words: Vec<u64> = (0..1003).map(|word| (word << 40) | word).collect();
        let expected = words.iter().fold(0u64, |all, word| all.wrapping_add(*word));
        for isa in Isa::available() {
            assert_eq!(sum(isa, &words), expected, "{isa}");
        }
    }
}
