//! Every system call and every call of the dynamic loader, with the types of the rest of the crate.
//!
//! It holds no policy: the modules above decide what to call and when.

mod allocator;
mod assembly;
mod copy;
mod descriptors;
mod fork;
mod loader;
mod memory;
mod probe;
mod rseq;
mod sanitizers;
mod signals;
mod threads;
mod timers;

pub(crate) use allocator::{
    __libc_calloc, __libc_free, __libc_malloc, __libc_memalign, __libc_realloc, UsableSize, sanitizers_calloc,
    sanitizers_free, sanitizers_malloc, sanitizers_memalign, sanitizers_realloc, sanitizers_usable_size,
};
pub(crate) use assembly::{answer_yes, pointer_guard, thread_id, thread_pointer, write_with};
#[cfg(test)]
pub(crate) use copy::reading_instructions;
pub(crate) use copy::{Inaccessible, copy_bytes_from, copy_from, copy_to, copy_value_from, resume_failed_copy};
pub(crate) use descriptors::{File, close, do_not_linger, duplicate_from, duplicate_to, file_of, is_open};
pub(crate) use fork::{around_forks, begin_fork, end_fork, is_forking};
pub(crate) use loader::{
    Library, TlsModule, function_at, libraries, loaded_count, lock_loader, lookup, lookup_next, next_symbol,
    prepare_unwinding, touch_module,
};
pub(crate) use memory::{
    DontNeed, Protection, advise, discard, lock, map_again, map_file, map_reserved, map_somewhere, page_size,
    physical_memory, pkey_alloc, protect, unlock, unmap, use_small_pages,
};
pub(crate) use probe::{
    Outcome, RSEQ_NONE, RSEQ_UNREGISTERED, fork_probe, free_all_keys, fsgsbase, kernel_release, keys_in_all, keys_left,
    memfd_secret, mseal, pkru_in_signal_frame, rseq, syscall_user_dispatch,
};
pub(crate) use rseq::{rseq_area, unregister_rseq};
pub(crate) use sanitizers::sanitizer;
pub(crate) use signals::{
    Action, AlternateStack, BlockedSignals, FAULTS, SS_AUTODISARM, action, alternate_stack, change_mask, ends_process,
    is_fault, is_limit, is_writable, replace_alternate_stack, resend, restore_alternate_stack, send_value, set_action,
    set_alternate_stack, unblock,
};
pub(crate) use threads::{
    abort_with, at_exit, auxiliary, closed_signals, delete_thread_key, exit_with, has_shadow_stack, keep_errno,
    own_stack, process_id, random_word, set_errno, set_for_thread, start_a_thread, thread_exists, thread_handle,
    thread_key, threads, wake,
};
pub(crate) use timers::{Timer, create_timer, delete_timer, pause_timer, set_timer};
