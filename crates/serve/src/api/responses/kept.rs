//! Responses kept for a while: to be fetched, answered on, or cancelled.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use tokio::sync::Notify;
use updraft_chat::{Message, Role};

use crate::app::App;
use crate::auth::Owner;

/// Everything kept together, as JSON; what was made first goes first.
const MAX_BYTES: usize = 64 << 20;

/// The responses of one server, each for whoever asked for it.
#[derive(Debug)]
pub(crate) struct Kept {
    max_responses: usize,
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    by_id: BTreeMap<String, Entry>,
    /// Their ids, oldest first.
    by_age: BTreeMap<u64, String>,
    next: u64,
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    owner: Owner,
    response: Value,
    conversation: Vec<Message>,
    /// Its place among all by age; set when it is kept, as its size is.
    number: u64,
    bytes: usize,
    /// Ends what makes it, if it is still being made.
    cancel: Option<Arc<Notify>>,
}

impl Entry {
    /// Counted before the entries are locked: an answer may be long.
    fn weighed(self) -> Self {
        let said = serde_json::to_vec(&self.conversation).map_or(0, |json| json.len());
        let bytes = said + self.response.to_string().len();
        Self { bytes, ..self }
    }
}

impl Entries {
    fn remove(&mut self, id: &str) -> Option<Entry> {
        let entry = self.by_id.remove(id)?;
        self.bytes -= entry.bytes;
        self.by_age.remove(&entry.number);
        if let Some(cancel) = &entry.cancel {
            cancel.notify_one();
        }
        Some(entry)
    }
}

impl Kept {
    pub(crate) fn new(max_responses: usize) -> Self {
        Self {
            max_responses,
            entries: Mutex::default(),
        }
    }

    pub(crate) fn get(&self, id: &str, owner: Owner) -> Option<Value> {
        let entries = self.lock();
        let entry = entries.by_id.get(id).filter(|entry| entry.owner == owner);
        entry.map(|entry| entry.response.clone())
    }

    /// Everything said up to the end of a response; none if it did not come to an answer.
    pub(crate) fn conversation(&self, id: &str, owner: Owner) -> Option<Vec<Message>> {
        let entries = self.lock();
        let entry = entries.by_id.get(id).filter(|entry| entry.owner == owner)?;
        let has_answer = ["completed", "incomplete"]
            .iter()
            .any(|end| entry.response["status"] == *end);
        has_answer.then(|| entry.conversation.clone())
    }

    /// Ends a response that is being made; one that has ended stays as it is.
    pub(crate) fn cancel(&self, id: &str, owner: Owner) -> Option<Value> {
        let mut entries = self.lock();
        let entry = entries
            .by_id
            .get_mut(id)
            .filter(|entry| entry.owner == owner)?;
        if let Some(cancel) = entry.cancel.take() {
            cancel.notify_one();
            entry.response["status"] = json!("cancelled");
        }
        Some(entry.response.clone())
    }

    /// `false` if there is none.
    pub(crate) fn remove(&self, id: &str, owner: Owner) -> bool {
        let mut entries = self.lock();
        let is_theirs = entries
            .by_id
            .get(id)
            .is_some_and(|entry| entry.owner == owner);
        is_theirs && entries.remove(id).is_some()
    }

    /// Keeps the end of a response that was begun, unless it was forgotten or cancelled meanwhile.
    fn finish(&self, entry: Entry) {
        let is_wanted = |known: &Entry| known.cancel.is_some();
        let entry = entry.weighed();
        let id = entry.response["id"].as_str().unwrap_or_default();
        let mut entries = self.lock();
        if entries.by_id.get(id).is_some_and(is_wanted) {
            self.keep(&mut entries, entry);
        }
    }

    fn insert(&self, entry: Entry) {
        let entry = entry.weighed();
        self.keep(&mut self.lock(), entry);
    }

    fn keep(&self, entries: &mut Entries, mut entry: Entry) {
        let id = entry.response["id"].as_str().unwrap_or_default().to_owned();
        entries.remove(&id);
        entry.number = entries.next;
        entries.next += 1;
        entries.bytes += entry.bytes;
        entries.by_age.insert(entry.number, id.clone());
        entries.by_id.insert(id, entry);
        while entries.by_id.len() > self.max_responses || entries.bytes > MAX_BYTES {
            let Some((_, oldest)) = entries.by_age.pop_first() else {
                break;
            };
            entries.remove(&oldest);
        }
    }

    // Each change is whole before the lock is given back, whatever panics.
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the end of one response is to be noted.
#[derive(Debug)]
pub(super) struct Keeping {
    pub(super) app: App,
    pub(super) owner: Owner,
    /// What it answers.
    pub(super) conversation: Vec<Message>,
}

impl Keeping {
    /// Keeps a response that is being made; what is returned ends when it is to be cancelled.
    pub(super) fn begin(&self, response: &Value) -> impl Future<Output = ()> + Send + 'static {
        let cancel = Arc::new(Notify::new());
        let notified = cancel.clone();
        self.app.kept.insert(Entry {
            owner: self.owner,
            response: response.clone(),
            conversation: Vec::new(),
            number: 0,
            bytes: 0,
            cancel: Some(cancel),
        });
        async move { notified.notified().await }
    }

    /// Keeps a response that has ended.
    pub(super) fn end(&self, response: &Value, text: &str) {
        let mut conversation = self.conversation.clone();
        conversation.push(Message::new(Role::Assistant, text));
        let entry = Entry {
            owner: self.owner,
            response: response.clone(),
            conversation,
            number: 0,
            bytes: 0,
            cancel: None,
        };
        match response["background"] == true {
            true => self.app.kept.finish(entry),
            false => self.app.kept.insert(entry),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Owner;

    fn entry(id: &str, text: &str) -> Entry {
        Entry {
            owner: Owner::default(),
            response: json!({"id": id, "status": "completed"}),
            conversation: vec![Message::new(Role::User, text)],
            number: 0,
            bytes: 0,
            cancel: None,
        }
    }

    #[test]
    fn the_oldest_make_room_by_number_and_by_size() {
        let kept = Kept::new(2);
        let has = |id: &str| kept.get(id, Owner::default()).is_some();
        for id in ["a", "b", "c"] {
            kept.insert(entry(id, "x"));
        }
        assert_eq!([has("a"), has("b"), has("c")], [false, true, true]);
        let long = "x".repeat(MAX_BYTES - 1000);
        kept.insert(entry("d", &long));
        assert_eq!([has("c"), has("d")], [true, true]);
        kept.insert(entry("e", &"x".repeat(2000)));
        assert_eq!([has("c"), has("d"), has("e")], [false, false, true]);
        for _ in 0..100 {
            kept.insert(entry("f", "x"));
            assert!(kept.remove("f", Owner::default()));
        }
        let entries = kept.lock();
        assert_eq!((entries.by_age.len(), entries.by_id.len()), (1, 1));
    }

    #[test]
    fn nobody_sees_what_another_asked() {
        let kept = Kept::new(2);
        kept.insert(entry("a", "x"));
        let other = Owner::of("another key");
        assert!(kept.get("a", other).is_none() && kept.conversation("a", other).is_none());
        assert!(kept.cancel("a", other).is_none() && !kept.remove("a", other));
        assert!(kept.conversation("a", Owner::default()).is_some());
    }

    /// The end of a response may come in the moment in which somebody deletes or cancels it.
    #[test]
    fn what_was_deleted_or_cancelled_does_not_come_back() {
        let kept = Kept::new(4);
        let begun = |id: &str| Entry {
            response: json!({"id": id, "status": "in_progress"}),
            cancel: Some(Arc::new(Notify::new())),
            ..entry(id, "x")
        };
        let everybody = Owner::default();
        ["a", "b", "c"].iter().for_each(|id| kept.insert(begun(id)));
        assert!(kept.remove("a", everybody));
        assert!(kept.cancel("b", everybody).is_some());
        ["a", "b", "c"]
            .iter()
            .for_each(|id| kept.finish(entry(id, "x")));
        assert!(kept.get("a", everybody).is_none());
        let cancelled = kept.get("b", everybody).expect("it is kept");
        assert_eq!(cancelled["status"], "cancelled");
        assert!(kept.conversation("b", everybody).is_none(), "no answer");
        assert!(kept.conversation("c", everybody).is_some());
    }
}
