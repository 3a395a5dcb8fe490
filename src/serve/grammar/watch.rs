//! Bounds the time that the masks of an answer take. They are computed between the steps of a model, while all its other
//! requests wait.

use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use llguidance::CancellationHandle;

/// Longest time for one token.
const MAX_STEP: Duration = Duration::from_millis(100);
/// Time for each token on average, over all of an answer's, and what the first ones may take besides.
const TIME_PER_TOKEN: Duration = Duration::from_millis(5);
const ALLOWANCE: Duration = Duration::from_millis(300);
/// What the masks of all answers together may take besides half of the time: beyond it, those that take more than their
/// share are ended.
const COMMON_ALLOWANCE: Duration = Duration::from_millis(200);
/// Interval at which what is being computed is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Cancels what takes too long, on a thread that lives as long as there are answers to watch.
#[derive(Debug, Default)]
pub(super) struct Watch {
    current: Mutex<Current>,
}

#[derive(Debug, Default)]
struct Current {
    /// What is being computed, and since when. A model's masks are computed by one thread.
    work: Option<(Instant, CancellationHandle)>,
    has_thread: bool,
    /// Time that masks took, less half of the time that has passed, and when that was reckoned.
    common: Duration,
    reckoned: Option<Instant>,
}

impl Current {
    /// Adds what a mask has taken; returns true if it is too much for all of them together.
    fn add(&mut self, now: Instant, taken: Duration) -> bool {
        let passed = self.reckoned.map_or(Duration::ZERO, |then| now.saturating_duration_since(then));
        self.reckoned = Some(now);
        self.common = self.common.saturating_sub(passed / 2).saturating_add(taken);
        self.common > COMMON_ALLOWANCE
    }
}

impl Watch {
    /// Begins to watch, unless it does already.
    pub fn begin(self: &Arc<Watch>) {
        let mut current = self.lock();
        if !std::mem::replace(&mut current.has_thread, true) {
            let watch = Arc::downgrade(self);
            let spawned = std::thread::Builder::new().name("aotron-watch".into()).spawn(move || look(&watch));
            current.has_thread = spawned.is_ok();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn look(watch: &Weak<Watch>) {
    loop {
        std::thread::sleep(LOOK);
        let Some(watch) = watch.upgrade() else { return };
        let mut current = watch.lock();
        // Besides this one and the owner's, each answer and its form have a reference.
        if Arc::strong_count(&watch) <= 2 {
            current.has_thread = false;
            return;
        }
        if let Some((_, handle)) = current.work.as_ref().filter(|(started, _)| started.elapsed() > MAX_STEP) {
            handle.cancel();
        }
    }
}

/// The time that one answer's masks have taken.
pub(super) struct Budget {
    watch: Arc<Watch>,
    handle: Option<CancellationHandle>,
    left: Duration,
}

impl Budget {
    pub fn new(watch: &Arc<Watch>, handle: Option<CancellationHandle>) -> Budget {
        let watch = watch.clone();
        watch.begin();
        Budget { watch, handle, left: ALLOWANCE }
    }

    /// A token more.
    pub fn add_token(&mut self) {
        self.left = self.left.saturating_add(TIME_PER_TOKEN);
    }

    /// Does work on a mask; `None` if the answer has no time left.
    pub fn spend<T>(&mut self, work: impl FnOnce() -> T) -> Option<T> {
        let started = Instant::now();
        self.watch.lock().work = self.handle.clone().map(|handle| (started, handle));
        let done = work();
        let (now, taken) = (Instant::now(), started.elapsed());
        let mut current = self.watch.lock();
        current.work = None;
        let is_too_much = current.add(now, taken);
        drop(current);
        self.left = self.left.checked_sub(taken)?;
        (!is_too_much || taken <= TIME_PER_TOKEN).then_some(done)
    }
}
