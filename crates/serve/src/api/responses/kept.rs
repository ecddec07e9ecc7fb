//! Responses kept for a while: to be fetched, answered on, or cancelled.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::de::DeserializeOwned;
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
    id: String,
    owner: Owner,
    /// As JSON: a value takes up to forty times as much.
    response: String,
    /// What was said up to its end, as JSON too.
    conversation: String,
    /// Its place among all by age; set when it is kept.
    number: u64,
    /// Ends what makes it, if it is still being made.
    cancel: Option<Arc<Notify>>,
}

impl Entry {
    /// Written before the entries are locked: an answer may be long.
    fn new(owner: Owner, response: &Value, said: &[Message], cancel: Option<Arc<Notify>>) -> Self {
        Self {
            id: response["id"].as_str().unwrap_or_default().to_owned(),
            owner,
            response: response.to_string(),
            conversation: serde_json::to_string(said).expect("messages have string keys only"),
            number: 0,
            cancel,
        }
    }

    fn bytes(&self) -> usize {
        self.response.len() + self.conversation.len()
    }
}

/// What an entry was written from.
fn read<T: DeserializeOwned>(json: &str) -> T {
    serde_json::from_str(json).expect("this room wrote it")
}

impl Entries {
    fn remove(&mut self, id: &str) -> Option<Entry> {
        let entry = self.by_id.remove(id)?;
        self.bytes -= entry.bytes();
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
        let response = self.of(id, owner, |entry| entry.response.clone())?;
        Some(read(&response))
    }

    /// Everything said up to the end of a response; none if it did not come to an answer.
    pub(crate) fn conversation(&self, id: &str, owner: Owner) -> Option<Vec<Message>> {
        let entry = |entry: &Entry| (entry.response.clone(), entry.conversation.clone());
        let (response, conversation) = self.of(id, owner, entry)?;
        let response: Value = read(&response);
        let has_answer = ["completed", "incomplete"]
            .iter()
            .any(|end| response["status"] == *end);
        has_answer.then(|| read(&conversation))
    }

    fn of<T>(&self, id: &str, owner: Owner, take: impl FnOnce(&Entry) -> T) -> Option<T> {
        let entries = self.lock();
        let entry = entries.by_id.get(id).filter(|entry| entry.owner == owner);
        entry.map(take)
    }

    /// Ends a response that is being made; one that has ended stays as it is.
    pub(crate) fn cancel(&self, id: &str, owner: Owner) -> Option<Value> {
        let mut entries = self.lock();
        let Entries { by_id, bytes, .. } = &mut *entries;
        let entry = by_id.get_mut(id).filter(|entry| entry.owner == owner)?;
        let mut response: Value = read(&entry.response);
        if let Some(cancel) = entry.cancel.take() {
            cancel.notify_one();
            response["status"] = json!("cancelled");
            *bytes -= entry.bytes();
            entry.response = response.to_string();
            *bytes += entry.bytes();
        }
        Some(response)
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
        let mut entries = self.lock();
        if entries.by_id.get(&entry.id).is_some_and(is_wanted) {
            self.keep(&mut entries, entry);
        }
    }

    fn insert(&self, entry: Entry) {
        self.keep(&mut self.lock(), entry);
    }

    fn keep(&self, entries: &mut Entries, mut entry: Entry) {
        let id = entry.id.clone();
        entries.remove(&id);
        entry.number = entries.next;
        entries.next += 1;
        entries.bytes += entry.bytes();
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
        let begun = Entry::new(self.owner, response, &[], Some(cancel));
        self.app.kept.insert(begun);
        async move { notified.notified().await }
    }

    /// Keeps a response that has ended.
    pub(super) fn end(&self, response: &Value, text: &str) {
        let mut conversation = self.conversation.clone();
        conversation.push(Message::new(Role::Assistant, text));
        let entry = Entry::new(self.owner, response, &conversation, None);
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
        let response = json!({"id": id, "status": "completed"});
        let said = [Message::new(Role::User, text)];
        Entry::new(Owner::default(), &response, &said, None)
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
        let begun = |id: &str| {
            let response = json!({"id": id, "status": "in_progress"});
            Entry::new(Owner::default(), &response, &[], Some(Arc::default()))
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
        let entries = kept.lock();
        let bytes = entries.by_id.values().map(Entry::bytes).sum::<usize>();
        assert_eq!(entries.bytes, bytes, "the books are right");
        drop(entries);
        assert!(kept.conversation("b", everybody).is_none(), "no answer");
        assert!(kept.conversation("c", everybody).is_some());
    }
}
