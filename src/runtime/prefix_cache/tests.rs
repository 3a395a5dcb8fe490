use std::cell::Cell;

use proptest::prelude::*;

use super::*;
use crate::error::Error;

const BLOCK: KvBlock = KvBlock { tokens: 3, bytes: 24 };
/// What a block counts for, without a salt.
const CHARGE: usize = 24 + 4 * 3 + OVERHEAD_BYTES;

fn salt(name: &str) -> Salt {
    (!name.is_empty()).then(|| name.into())
}

/// What an executor gives for a block of a sequence: it depends on the salt and on every id up to the block's end.
fn content(salt: &Salt, ids: &[u32], index: usize) -> Vec<u8> {
    let prefix = &ids[..(index + 1) * BLOCK.tokens];
    let mut digest = [0u64; 3];
    for (round, word) in digest.iter_mut().enumerate() {
        let of_salt = salt.iter().flat_map(|salt| salt.bytes()).map(u32::from);
        let all = of_salt.chain([u32::MAX]).chain(prefix.iter().copied());
        *word = all.fold(round as u64 + 1, |hash, id| {
            (hash ^ u64::from(id)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23)
        });
    }
    bytemuck::cast_slice(&digest).to_vec()
}

/// Stores all of a sequence; returns the number of blocks that were read for it.
fn store(cache: &mut PrefixCache, salt: &Salt, ids: &[u32]) -> usize {
    let reads = Cell::new(0);
    let blocks = ids.len() / BLOCK.tokens;
    let read = |index: usize, into: &mut [u8]| {
        reads.set(reads.get() + 1);
        into.copy_from_slice(&content(salt, ids, index));
        Ok(())
    };
    assert_eq!(cache.store(salt, ids, (0, blocks), &mut usize::MAX.clone(), read), blocks);
    reads.get()
}

/// Tokens of a sequence that are found, whose contents must be its own.
fn found(cache: &mut PrefixCache, salt: &Salt, ids: &[u32]) -> usize {
    let chain = cache.find(salt, ids);
    for (index, id) in chain.iter().enumerate() {
        assert_eq!(cache.data(*id).unwrap(), content(salt, ids, index), "block {index} of {ids:?}");
    }
    chain.len() * BLOCK.tokens
}

#[test]
fn the_oldest_blocks_give_way_and_a_prefix_stays_as_long_as_what_follows_it() {
    let mut cache = PrefixCache::new(BLOCK, 4 * CHARGE);
    let none = salt("");
    assert_eq!(store(&mut cache, &none, &[1, 1, 1, 2, 2, 2, 9]), 2);
    assert_eq!(store(&mut cache, &none, &[1, 1, 1, 3, 3, 3]), 1, "the first block is shared");
    assert_eq!(store(&mut cache, &none, &[4, 4, 4]), 1);
    // The next is room for [2, 2, 2] only, which nothing has used for longest.
    assert_eq!(found(&mut cache, &none, &[1, 1, 1, 3, 3, 3]), 6);
    assert_eq!(store(&mut cache, &none, &[5, 5, 5]), 1);
    assert_eq!(found(&mut cache, &none, &[1, 1, 1, 2, 2, 2]), 3);
    assert_eq!(found(&mut cache, &none, &[4, 4, 4]), 3);
    let mut status = PrefixCacheStatus::default();
    cache.observe(&mut status);
    assert_eq!((status.blocks, status.bytes, status.limit_bytes), (4, 4 * CHARGE, 4 * CHARGE));
    assert_eq!((status.stored_blocks, status.evicted_blocks), (5, 1));
    // Of a sequence that is longer than the cache, its beginning stays.
    let long: Vec<u32> = (10..30).collect();
    assert_eq!(store(&mut cache, &none, &long), 4);
    assert_eq!(found(&mut cache, &none, &long), 12);
}

#[test]
fn a_budget_is_kept_to_and_what_cannot_be_stored_is_given_up() {
    let mut cache = PrefixCache::new(BLOCK, 100 * CHARGE);
    let (none, ids) = (salt(""), [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]);
    let read = |index: usize, into: &mut [u8]| {
        into.copy_from_slice(&content(&None, &ids, index));
        Ok(())
    };
    let mut budget = 3;
    assert_eq!(cache.store(&none, &ids, (0, 2), &mut budget, read), 2);
    assert_eq!(cache.store(&none, &ids, (2, 4), &mut budget, read), 3);
    assert_eq!((budget, found(&mut cache, &none, &ids)), (0, 9));
    let mut budget = 9;
    assert_eq!(cache.store(&none, &[9; 12], (1, 4), &mut budget, read), 4, "its first block is not here");
    let fails = |_: usize, _: &mut [u8]| Err(Error::Step("no".into()));
    assert_eq!(cache.store(&none, &ids, (3, 4), &mut budget, fails), 4);
    assert_eq!((found(&mut cache, &none, &[9; 12]), found(&mut cache, &none, &ids)), (0, 9));
    let mut nothing = PrefixCache::new(BLOCK, CHARGE - 1);
    assert_eq!(nothing.store(&none, &ids, (0, 4), &mut budget, read), 4);
    assert_eq!(found(&mut nothing, &none, &ids), 0);
}

#[test]
fn what_cannot_be_trusted_is_forgotten_with_all_that_follows_it() {
    let mut cache = PrefixCache::new(BLOCK, 100 * CHARGE);
    let (none, other) = (salt(""), salt("other"));
    for salt in [&none, &other] {
        store(&mut cache, salt, &[1, 1, 1, 2, 2, 2]);
        store(&mut cache, salt, &[1, 1, 1, 3, 3, 3]);
    }
    cache.forget(&none, &[1, 1, 1, 4, 4, 4]);
    assert_eq!(found(&mut cache, &none, &[1, 1, 1, 2, 2, 2]), 0);
    assert_eq!(found(&mut cache, &other, &[1, 1, 1, 2, 2, 2]), 6);
    assert_eq!((cache.blocks.len(), cache.by_use.len(), cache.roots.len()), (3, 3, 1));
    cache.forget(&other, &[1]);
    cache.forget(&other, &[1, 1, 1]);
    assert_eq!((cache.blocks.len(), cache.bytes, cache.roots.len()), (0, 0, 0));
}

#[derive(Debug, Clone)]
enum Use {
    Store { salt: &'static str, ids: Vec<u32>, budget: usize },
    Find { salt: &'static str, ids: Vec<u32> },
    Forget { salt: &'static str, ids: Vec<u32> },
}

fn uses() -> impl Strategy<Value = Vec<Use>> {
    let salts = || prop::sample::select(vec!["", "a", "a longer one"]);
    // Few ids and many common prefixes.
    let ids = || prop::collection::vec(0u32..2, 0..20);
    let one = prop_oneof![
        4 => (salts(), ids(), 0usize..8).prop_map(|(salt, ids, budget)| Use::Store { salt, ids, budget }),
        4 => (salts(), ids()).prop_map(|(salt, ids)| Use::Find { salt, ids }),
        1 => (salts(), ids()).prop_map(|(salt, ids)| Use::Forget { salt, ids }),
    ];
    prop::collection::vec(one, 1..60)
}

proptest! {
    /// Against a model that knows every prefix that was ever stored and not forgotten, and the order of their last uses.
    #[test]
    fn what_is_found_is_the_same_prefix_under_the_same_salt(uses in uses(), room in 0usize..12) {
        let limit = room * (CHARGE + 4);
        let mut cache = PrefixCache::new(BLOCK, limit);
        // Prefixes, the one used longest ago first.
        let mut model: Vec<(&str, Vec<u32>)> = Vec::new();
        for step in uses {
            let (name, ids) = match &step {
                Use::Store { salt, ids, .. } | Use::Find { salt, ids } | Use::Forget { salt, ids } => (*salt, ids.clone()),
            };
            let own = salt(name);
            let prefix = |index: usize| (name, ids[..(index + 1) * BLOCK.tokens].to_vec());
            let blocks = ids.len() / BLOCK.tokens;
            match step {
                Use::Store { budget, .. } => {
                    let mut left = budget;
                    let mut read = Vec::new();
                    let next = cache.store(&own, &ids, (0, blocks), &mut left, |index, into| {
                        read.push(index);
                        into.copy_from_slice(&content(&own, &ids, index));
                        Ok(())
                    });
                    prop_assert_eq!(left, budget - read.len());
                    prop_assert!(read.iter().all(|index| !model.contains(&prefix(*index))), "read though it is here");
                    prop_assert!(next == blocks || (left == 0 && read.last().is_none_or(|last| last + 1 == next)));
                    model.extend(read.into_iter().map(prefix));
                }
                Use::Find { .. } => {}
                Use::Forget { .. } if blocks > 0 => {
                    cache.forget(&own, &ids);
                    model.retain(|(salt, stored)| *salt != name || !stored.starts_with(&ids[..BLOCK.tokens]));
                }
                Use::Forget { .. } => {}
            }
            let found = found(&mut cache, &own, &ids) / BLOCK.tokens;
            // The last uses are those of what was found, the end of it first.
            for index in (0..found).rev() {
                let at = model.iter().position(|stored| *stored == prefix(index));
                let Some(at) = at else { return Err(TestCaseError::fail("found though it was never stored")) };
                let stored = model.remove(at);
                model.push(stored);
            }
            // What gave way is what had been unused for longest.
            let here = cache.blocks.len();
            prop_assert!(here <= model.len());
            model.drain(..model.len() - here);
            prop_assert!(cache.bytes <= limit && cache.by_use.len() == here);
            let mut reachable = 0;
            for (salt_name, stored) in &model {
                let last = stored.len() / BLOCK.tokens - 1;
                let chain = {
                    let mut children = cache.roots.get(&salt(salt_name));
                    let mut chain = Vec::new();
                    for ids in stored.chunks_exact(BLOCK.tokens) {
                        let Some(id) = children.and_then(|children| children.get(ids)) else { break };
                        chain.push(*id);
                        children = cache.blocks.get(id).map(|block| &block.children);
                    }
                    chain
                };
                prop_assert_eq!(chain.len(), last + 1, "the model has it: {:?}", stored);
                reachable += 1;
            }
            prop_assert_eq!(reachable, here);
            let charged: usize = cache.blocks.values().map(|block| cache.charge(&block.parent)).sum();
            prop_assert_eq!(charged, cache.bytes);
        }
    }
}
