package conformance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// TestListStream reads a long list slowly and does everything else meanwhile.
func TestListStream(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := serve(t)
	const count = 1050
	// Some megabytes, so that the daemon cannot have sent everything before it is read.
	labels := map[string]string{"a": strings.Repeat("x", 4000), "b": strings.Repeat("y", 4000)}
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := w; i < count; i += 8 {
				if _, err := s.prepare(fmt.Sprintf("active %d", i), "", labels); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()

	ctx, cancel := limit()
	defer cancel()
	stream, err := s.api().List(ctx, &snapshotsapi.ListSnapshotsRequest{Snapshotter: name})
	must(t, err)
	seen := map[string]bool{}
	for messages := 0; ; messages++ {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		if n := len(r.GetInfo()); n == 0 || n > 100 {
			t.Errorf("a message of %d infos", n)
		}
		for _, info := range r.GetInfo() {
			if seen[info.GetName()] {
				t.Errorf("%s is listed twice", info.GetName())
			}
			seen[info.GetName()] = true
		}
		if messages > 2 {
			continue
		}
		// The stream is open and not read.
		info, err := s.stat(r.GetInfo()[0].GetName())
		must(t, err)
		if !proto.Equal(info, r.GetInfo()[0]) {
			t.Errorf("Stat says %v, List %v", info, r.GetInfo()[0])
		}
		key := fmt.Sprintf("meanwhile %d", messages)
		_, err = s.prepare(key, "", nil)
		must(t, err)
		_, err = s.mounts(key)
		must(t, err)
		_, err = s.update(&snapshotsapi.Info{Name: key, Labels: labels})
		must(t, err)
		must(t, s.commit(key+" done", key, "", nil))
		must(t, s.remove(key+" done"))
		must(t, s.cleanup())
	}
	for i := range count {
		if !seen[fmt.Sprintf("active %d", i)] {
			t.Errorf("active %d is missing", i)
		}
	}

	// Whoever leaves a stream open or drops it harms nobody.
	for range 20 {
		ctx, cancel := context.WithCancel(context.Background())
		stream, err := s.api().List(ctx, &snapshotsapi.ListSnapshotsRequest{Snapshotter: name})
		must(t, err)
		_, err = stream.Recv()
		must(t, err)
		defer cancel()
	}
	if got := len(s.names(t, `labels.a`)); got != count {
		t.Errorf("%d snapshots listed, want %d", got, count)
	}
}

// TestCancel gives up on calls at random moments. Each must have been done or
// not at all: containerd will not ask again with the same key.
func TestCancel(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := serve(t)
	s.layer(t, "base", "", nil)
	var wg sync.WaitGroup
	for w := range 8 {
		rng := rand.New(rand.NewPCG(1, uint64(w)))
		wg.Go(func() {
			api := s.api()
			try := func(call func(context.Context) error) bool {
				ctx, cancel := context.WithTimeout(context.Background(), time.Duration(rng.IntN(4000))*time.Microsecond)
				defer cancel()
				err := call(ctx)
				if c := status.Code(err); c != codes.OK && c != codes.DeadlineExceeded && c != codes.Canceled {
					t.Errorf("a call with a deadline: %v", err)
				}
				return err == nil
			}
			for i := range 50 {
				key, to := fmt.Sprintf("active %d %d", w, i), fmt.Sprintf("committed %d %d", w, i)
				prepared := try(func(ctx context.Context) error {
					_, err := api.Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: name, Key: key, Parent: "base"})
					return err
				})
				settle(t, s, key, prepared)
				if _, err := s.stat(key); err != nil {
					continue
				}
				committed := try(func(ctx context.Context) error {
					_, err := api.Commit(ctx, &snapshotsapi.CommitSnapshotRequest{Snapshotter: name, Key: key, Name: to})
					return err
				})
				settle(t, s, to, committed)
				_, errTo := s.stat(to)
				_, errKey := s.stat(key)
				if errTo == nil && errKey == nil || errTo != nil && errKey != nil && !exists(s, to) {
					t.Errorf("Commit is half done: key %v, name %v", errKey, errTo)
				}
				if errTo != nil {
					continue
				}
				removed := try(func(ctx context.Context) error {
					_, err := api.Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: name, Key: to})
					return err
				})
				if _, err := s.stat(to); removed && status.Code(err) != codes.NotFound {
					t.Errorf("removed, but Stat says %v", err)
				}
			}
		})
	}
	wg.Wait()
	// What went on without its caller ends in the drain. What is listed then
	// works, and can go.
	s.restart(t, unix.SIGTERM)
	infos, err := s.list()
	must(t, err)
	for _, i := range infos {
		if i.GetKind() == snapshotsapi.Kind_ACTIVE {
			m, err := s.mounts(i.GetName())
			must(t, err)
			mounted(t, m, func(dir string) { write(t, dir+"/file", "works") })
		}
		if i.GetName() != "base" {
			must(t, s.remove(i.GetName()))
		}
	}
	must(t, s.remove("base"))
	must(t, s.cleanup())
	s.wantNames(t)
	s.wantConsistent(t)
}

func exists(s *server, key string) bool {
	_, err := s.stat(key)
	return err == nil
}

// settle waits until a call that may go on without its caller has an outcome
// that stays, and checks it against the answer.
func settle(t *testing.T, s *server, key string, answered bool) {
	t.Helper()
	_, err := s.stat(key)
	for end := time.Now().Add(20 * time.Millisecond); err != nil && !answered && time.Now().Before(end); {
		time.Sleep(2 * time.Millisecond)
		_, err = s.stat(key)
	}
	if answered {
		must(t, err)
	} else if err != nil {
		wantCode(t, "Stat after a call that was given up", err, codes.NotFound)
	}
}
