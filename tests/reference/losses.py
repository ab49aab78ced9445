"""The losses of one stream, one number at a time (equation 6 of arXiv 2604.20915 and its variants)."""

import torch


def hidden_distance(student, teacher, *, norm, normalized):
    """Mean over layers of the mean over positions and features; `student` is a list of [T, D]."""
    layer_distances = []
    for student_TD, teacher_TD in zip(student, teacher, strict=True):
        difference, size = 0.0, 0.0
        for student_D, teacher_D in zip(student_TD, teacher_TD, strict=True):
            if norm == "l1":
                difference = difference + torch.sum(torch.abs(student_D - teacher_D))
                size = size + torch.sum(torch.abs(teacher_D))
            else:
                difference = difference + torch.sum((student_D - teacher_D) ** 2)
                size = size + torch.sum(teacher_D**2)
        layer_distances.append(difference / size if normalized else difference / student_TD.numel())
    return sum(layer_distances) / len(layer_distances)


def mixed_log_probabilities(logits_and_shares):
    """Log-probabilities of one position: the weighted geometric mean of several teachers' distributions."""
    product_V = 1.0
    for logits_V, share in logits_and_shares:
        product_V = product_V * torch.softmax(logits_V, dim=0) ** share
    return torch.log(product_V / product_V.sum())


def kl(student_logits_TV, teachers):
    """Mean over positions of KL(teacher || student); `teachers` is a list of (logits [T, V], share)."""
    total = 0.0
    for t, student_logits_V in enumerate(student_logits_TV):
        log_p_V = mixed_log_probabilities([(logits_TV[t], share) for logits_TV, share in teachers])
        log_q_V = torch.log(torch.softmax(student_logits_V, dim=0))
        total = total + torch.sum(torch.exp(log_p_V) * (log_p_V - log_q_V))
    return total / len(student_logits_TV)


def next_token(student_logits_TV, token_ids, *, num_generated):
    """Mean of -log q(y_(t+1) | y_(..t)) over the tokens of the stream; the generated ones at the end do not count."""
    terms = []
    for t in range(len(token_ids) - 1):
        if t + 1 < len(token_ids) - num_generated:
            terms.append(-torch.log(torch.softmax(student_logits_TV[t], dim=0)[token_ids[t + 1]]))
    return sum(terms) / len(terms) if terms else torch.zeros((), dtype=student_logits_TV.dtype)


def update_size(now, before, *, norm):
    """Mean absolute or squared change of a weight; both are lists of the products s B A."""
    total, count = 0.0, 0
    for new, old in zip(now, before, strict=True):
        change = new - old
        total = total + (change.abs().sum() if norm == "l1" else (change**2).sum())
        count += change.numel()
    return total / count
