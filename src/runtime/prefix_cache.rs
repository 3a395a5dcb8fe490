//! Keys and values of sequences that have left their slots, in blocks of a fixed number of tokens.
//!
//! Blocks form a tree: below the salt of the requests that computed them, a block is a child of the one before it, found
//! by its own token ids. So a block is reached only by the ids of its whole prefix, compared one by one, and never by a
//! hash that another prefix could share.
//!
//! The blocks used longest ago give way to new ones. A use of a block is a use of all before it, later by a moment, so
//! that a block always goes before those that lead to it.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;

use crate::backend::{Executor, KvBlock};
use crate::error::Result;
use crate::memory::available_memory_bytes;

#[cfg(test)]
mod tests;

/// Bytes that a block takes beside its keys, values and ids, about.
const OVERHEAD_BYTES: usize = 256;

/// The salt of the requests that may share keys and values; those without one share among themselves.
pub(super) type Salt = Option<Arc<str>>;

type Children = HashMap<Arc<[u32]>, BlockId>;

/// Identifies a block. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct BlockId(u64);

/// A bounded store of blocks.
pub(super) struct PrefixCache {
    block: KvBlock,
    limit_bytes: usize,
    bytes: usize,
    /// First blocks of sequences, by salt.
    roots: HashMap<Salt, Children>,
    blocks: HashMap<BlockId, CachedBlock>,
    /// Blocks by the moment of their last use.
    by_use: BTreeMap<u64, BlockId>,
    next_id: u64,
    /// The moment of the next use.
    now: u64,
    stored_blocks: u64,
    evicted_blocks: u64,
}

struct CachedBlock {
    parent: Parent,
    ids: Arc<[u32]>, // [KvBlock::tokens]
    children: Children,
    data: Box<[u8]>, // [KvBlock::bytes]
    used: u64,
}

#[derive(Clone)]
enum Parent {
    Root(Salt),
    Block(BlockId),
}

impl PrefixCache {
    /// Creates a cache of at most `limit_bytes`, all bookkeeping included; nothing is allocated before it is stored.
    pub fn new(block: KvBlock, limit_bytes: usize) -> PrefixCache {
        PrefixCache {
            block,
            limit_bytes,
            bytes: 0,
            roots: HashMap::new(),
            blocks: HashMap::new(),
            by_use: BTreeMap::new(),
            next_id: 0,
            now: 0,
            stored_blocks: 0,
            evicted_blocks: 0,
        }
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> usize {
        self.block.tokens
    }

    /// The blocks that hold a prefix of `ids` computed with this salt, as many as there are, first block first. This
    /// counts as their use.
    pub fn find(&mut self, salt: &Salt, ids: &[u32]) -> Vec<BlockId> {
        let mut chain = Vec::new();
        let mut children = self.roots.get(salt);
        for ids in ids.chunks_exact(self.block.tokens) {
            let Some(id) = children.and_then(|children| children.get(ids)) else { break };
            chain.push(*id);
            children = self.blocks.get(id).map(|block| &block.children);
        }
        self.touch(&chain);
        chain
    }

    /// The keys and values of a block, as the executor gave them.
    pub fn data(&self, id: BlockId) -> Option<&[u8]> {
        self.blocks.get(&id).map(|block| &*block.data)
    }

    /// Stores blocks `first` to `end` (exclusive) of the sequence `ids`. Those that are here already cost nothing; for each
    /// of the others, as long as `budget` lasts, `read` is given the block's index and memory to fill, and `budget` is
    /// reduced by one. Returns the first block that is still to be stored; `end` also where the rest cannot be: a block
    /// before it is not here, there is no memory, or `read` fails.
    pub fn store(
        &mut self,
        salt: &Salt,
        ids: &[u32],
        (first, end): (usize, usize),
        budget: &mut usize,
        mut read: impl FnMut(usize, &mut [u8]) -> Result<()>,
    ) -> usize {
        let before = self.now;
        let whole = end.saturating_mul(self.block.tokens).min(ids.len());
        let mut chain = self.find(salt, ids.get(..whole).unwrap_or(ids));
        if chain.len() < first {
            return end;
        }
        let mut is_over = false;
        for ids in ids.chunks_exact(self.block.tokens).take(end).skip(chain.len()) {
            if *budget == 0 {
                break;
            }
            let parent = chain.last().map_or_else(|| Parent::Root(salt.clone()), |id| Parent::Block(*id));
            let filled = self.make_room(&parent, before).and_then(|mut data| {
                *budget -= 1;
                read(chain.len(), &mut data).ok().map(|()| data)
            });
            let Some(data) = filled else {
                is_over = true;
                break;
            };
            chain.push(self.insert(parent, ids.into(), data));
        }
        // Those that lead to a block are used after it.
        self.touch(&chain);
        if is_over { end } else { chain.len().min(end) }
    }

    /// Drops every block of the sequence `ids`, and what follows them: their numbers cannot be trusted.
    pub fn forget(&mut self, salt: &Salt, ids: &[u32]) {
        let Some(first) = ids.chunks_exact(self.block.tokens).next() else { return };
        let Some(id) = self.roots.get(salt).and_then(|children| children.get(first)).copied() else { return };
        let mut doomed = vec![id];
        while let Some(id) = doomed.pop() {
            doomed.extend(self.blocks.get(&id).into_iter().flat_map(|block| block.children.values()));
            self.remove(id);
        }
    }

    /// Fills in what is here of an engine's status.
    pub fn observe(&self, status: &mut PrefixCacheStatus) {
        status.limit_bytes = self.limit_bytes;
        status.bytes = self.bytes;
        status.blocks = self.blocks.len();
        status.stored_blocks = self.stored_blocks;
        status.evicted_blocks = self.evicted_blocks;
    }

    /// Records a use of the blocks of a chain, the last one first.
    fn touch(&mut self, chain: &[BlockId]) {
        for id in chain.iter().rev() {
            if let Some(block) = self.blocks.get_mut(id) {
                self.by_use.remove(&block.used);
                block.used = self.now;
                self.by_use.insert(self.now, *id);
                self.now += 1;
            }
        }
    }

    /// Memory for a block below `parent`, from blocks that were last used before the moment `before`; `None` if it is not
    /// enough.
    fn make_room(&mut self, parent: &Parent, before: u64) -> Option<Box<[u8]>> {
        let wanted = self.charge(parent);
        let mut data = None;
        while self.bytes.saturating_add(wanted) > self.limit_bytes {
            let (used, id) = self.by_use.first_key_value().map(|(used, id)| (*used, *id))?;
            if used >= before {
                return None;
            }
            data = self.remove(id);
            self.evicted_blocks += 1;
        }
        data.or_else(|| bytemuck::allocation::try_zeroed_slice_box(self.block.bytes).ok())
    }

    /// Bytes that a block below `parent` counts for.
    fn charge(&self, parent: &Parent) -> usize {
        let salt = match parent {
            Parent::Root(Some(salt)) => salt.len(),
            _ => 0,
        };
        self.block.bytes + 4 * self.block.tokens + OVERHEAD_BYTES + salt
    }

    fn insert(&mut self, parent: Parent, ids: Arc<[u32]>, data: Box<[u8]>) -> BlockId {
        let id = BlockId(self.next_id);
        self.next_id += 1;
        self.bytes += self.charge(&parent);
        self.stored_blocks += 1;
        match &parent {
            Parent::Root(salt) => self.roots.entry(salt.clone()).or_default().insert(ids.clone(), id),
            Parent::Block(above) => self.blocks.get_mut(above).and_then(|b| b.children.insert(ids.clone(), id)),
        };
        self.by_use.insert(self.now, id);
        self.blocks.insert(id, CachedBlock { parent, ids, children: Children::new(), data, used: self.now });
        self.now += 1;
        id
    }

    /// Removes a block and returns its memory. Those below it, if any, cannot be reached any more.
    fn remove(&mut self, id: BlockId) -> Option<Box<[u8]>> {
        let CachedBlock { parent, ids, data, used, .. } = self.blocks.remove(&id)?;
        self.by_use.remove(&used);
        self.bytes = self.bytes.saturating_sub(self.charge(&parent));
        match &parent {
            Parent::Root(salt) => {
                if let Some(children) = self.roots.get_mut(salt) {
                    children.remove(&ids);
                    if children.is_empty() {
                        self.roots.remove(salt);
                    }
                }
            }
            Parent::Block(above) => {
                if let Some(above) = self.blocks.get_mut(above) {
                    above.children.remove(&ids);
                }
            }
        }
        Some(data)
    }
}

impl fmt::Debug for PrefixCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let blocks = self.blocks.len();
        f.debug_struct("PrefixCache").field("blocks", &blocks).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

/// The limit where none is given: as much as the executor's own KV memory, but at most a quarter of the memory that is
/// left once that is in use.
pub(super) fn default_limit_bytes(executor: &dyn Executor) -> usize {
    let (Some(block), limits) = (executor.kv_block(), executor.limits()) else { return 0 };
    let blocks = limits.max_sequence_tokens.div_ceil(block.tokens.max(1)).saturating_mul(limits.slots);
    let kv_bytes = blocks.saturating_mul(block.bytes);
    let available = available_memory_bytes().map_or(0, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
    kv_bytes.min(available.saturating_sub(kv_bytes) / 4)
}

/// Prompt tokens that were not computed, since their keys and values were there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PrefixReuse {
    /// Requests that began with some.
    pub requests: u64,
    /// The tokens.
    pub tokens: u64,
}

impl PrefixReuse {
    /// Counts a request that reuses so many tokens.
    pub(super) fn count(&mut self, tokens: usize) {
        self.requests += u64::from(tokens > 0);
        self.tokens += tokens as u64;
    }
}

/// The prefix cache of an engine at one point in time, and what it has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PrefixCacheStatus {
    /// Bytes that blocks outside of the slots may take; 0 where there are none.
    pub limit_bytes: usize,
    /// Bytes that they take.
    pub bytes: usize,
    /// Their number.
    pub blocks: usize,
    /// Blocks stored since the start.
    pub stored_blocks: u64,
    /// Of those, the ones that gave way to others.
    pub evicted_blocks: u64,
    /// What was left in the slot that a request took.
    pub from_slot: PrefixReuse,
    /// What was copied from another slot.
    pub from_other_slot: PrefixReuse,
    /// What was copied from the blocks.
    pub from_blocks: PrefixReuse,
}
